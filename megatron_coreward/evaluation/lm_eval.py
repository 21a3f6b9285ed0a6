"""Benchmarks by the harness that the field uses, lm-evaluation-harness, over the rollout engines.

The harness has the tasks, their prompts and their scores; the engines have the model. Both run in a process of their
own (`evaluation.lm_eval_job`).

OUT/results.json    each benchmark's number with its interval, and all numbers of the harness
OUT/samples.jsonl   the model's texts; a killed evaluation goes on from it
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.evaluation.benchmarks import BENCHMARKS, TEMPERATURE, MathBenchmark, missing
from megatron_coreward.evaluation.evaluate import Engines
from megatron_coreward.evaluation.json_files import write_json

if TYPE_CHECKING:
    from typing import Literal

INSTALL = 'pip install "megatron-coreward[evaluation]"'
REQUEST = "request.json"
RESULTS = "results.json"


def run_lm_eval(
    model: Path,
    benchmarks: Sequence[str],
    out: Path,
    engines: Engines,
    *,
    data: Path,
    dtype: "Literal['float32', 'bfloat16']" = "bfloat16",
    temperature: float | None = TEMPERATURE,
    top_p: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    max_model_len: int | None = None,
    limit: int | None = None,
    chat_template: bool = True,
    thinking: bool | None = None,
    allow_code: bool = False,
    include_path: Path | None = None,
) -> dict[str, Any]:
    """Measures a Hugging Face model on benchmarks, with the harness's output on this terminal.

    Args:
        benchmarks: those of `evaluation.benchmarks` that the harness measures, or names of its tasks.
        data: the folder of `evaluation.benchmarks`; other tasks load what they name themselves.
        temperature, top_p, max_tokens: None: as each task has it.
        max_model_len: tokens of a prompt and its answer; None: as many as the model takes.
        limit: only the first questions of each task, as many as this.
        include_path: a folder with further task definitions.

    Returns the results by benchmark: value, low, high, metric, num_questions, metrics, settings.

    Raises InputError if it is not installed, for benchmarks that cannot run, and for what the harness's tasks refuse;
    RunError if it fails.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            f"lm-evaluation-harness is not installed, which measures {benchmarks[0]}; install it: {INSTALL}"
        )
    _check(benchmarks, data, allow_code)
    request = {
        "model": str(model.resolve()),
        "benchmarks": list(dict.fromkeys(benchmarks)),
        "out": str(out.resolve()),
        "data": str(data.resolve()),
        "include_paths": [] if include_path is None else [str(include_path.resolve())],
        "generation": {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed},
        "engines": asdict(engines),
        "dtype": dtype,
        "max_length": max_model_len or read_architecture(model).max_position,
        "limit": limit,
        "chat_template": chat_template,
        "thinking": thinking,
        "allow_code": allow_code,
    }
    answer = _run_job(request, out)
    if "error" in answer:
        raise InputError(answer["error"])
    return dict(answer["benchmarks"])


def _run_job(request: Mapping[str, Any], out: Path) -> Mapping[str, Any]:
    """Runs the harness in a process of its own and returns what it has left."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).unlink(missing_ok=True)
    write_json(out / REQUEST, request)
    command = [sys.executable, "-m", "megatron_coreward.evaluation.lm_eval_job", str(out / REQUEST)]
    status = subprocess.run(command, check=False).returncode
    return _answer(out / RESULTS, status)


def _check(benchmarks: Sequence[str], data: Path, allow_code: bool) -> None:
    if not benchmarks:
        raise InputError(f"no benchmark given; allowed: {', '.join(BENCHMARKS)}")
    for name in benchmarks:
        if isinstance(BENCHMARKS.get(name), MathBenchmark):
            raise InputError(f"benchmark {name}: `evaluate run` measures it, or `evaluate paper` with all others")
        if name in BENCHMARKS and (reason := missing(name, data, allow_code=allow_code)) is not None:
            raise InputError(f"benchmark {name}: {reason}")


def _answer(path: Path, status: int) -> Mapping[str, Any]:
    if not path.is_file():
        raise RunError(f"lm-evaluation-harness ended with exit status {status} and left no {path}")
    return dict(json.loads(path.read_text()))
