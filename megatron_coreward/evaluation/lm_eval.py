"""The paper's other benchmarks (arXiv 2508.00410, table 2), by the harness that the field uses: lm-evaluation-harness.

One command line of `lm_eval` with its vLLM backend; no benchmark is written again here. It needs its own
installation (`pip install "lm_eval[vllm,ifeval]"`), and it downloads the benchmarks' data.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_coreward.errors import InputError, RunError

INSTALL = 'pip install "lm_eval[vllm,ifeval]>=0.4.13"'


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What the harness calls a benchmark."""

    tasks: tuple[str, ...]
    runs_code: bool = False  # executes what the model wrote


# Names as of lm-evaluation-harness 0.4.13. LiveCodeBench has no task there (its pull request 3904 was closed), so it
# needs a definition of the user's own, by the name given here.
BENCHMARKS: Mapping[str, Benchmark] = {
    "ifeval": Benchmark(("ifeval",)),
    "mmlu_pro": Benchmark(("mmlu_pro",)),
    "crux": Benchmark(("cruxeval_input_cot", "cruxeval_output_cot"), runs_code=True),
    "livecodebench": Benchmark(("livecodebench",), runs_code=True),
}
WITHOUT_TASK = frozenset({"livecodebench"})


def lm_eval_command(
    model: Path,
    benchmarks: Sequence[str],
    out: Path,
    *,
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    limit: int | None = None,
    chat_template: bool = True,
    allow_code: bool = False,
    include_path: Path | None = None,
    program: Sequence[str] = ("lm_eval",),
) -> list[str]:
    """The command line that measures a Hugging Face model on benchmarks and writes its results under `out`.

    Raises InputError for an unknown benchmark, for one that runs code if that is not allowed, and for one that the
    harness has no task for and no `include_path` is given.
    """
    _check(benchmarks, allow_code, include_path)
    model_args = {
        "pretrained": str(model.resolve()),
        "dtype": dtype,
        "tensor_parallel_size": tensor_parallel,
        "gpu_memory_utilization": gpu_memory_utilization,
        **({} if max_model_len is None else {"max_model_len": max_model_len}),
    }
    if any(sign in str(model.resolve()) for sign in ",="):
        raise InputError(f"{model}: lm_eval cannot read a path with a comma or an equals sign; rename it")
    command = [
        *program,
        "run",
        "--model",
        "vllm",
        "--model_args",
        ",".join(f"{key}={value}" for key, value in model_args.items()),
        "--tasks",
        ",".join(task for name in benchmarks for task in BENCHMARKS[name].tasks),
        "--batch_size",
        "auto",
        "--output_path",
        str(out),
        "--log_samples",
    ]
    if chat_template:
        command.append("--apply_chat_template")
    if limit is not None:
        command += ["--limit", str(limit)]
    if include_path is not None:
        command += ["--include_path", str(include_path.resolve())]
    if any(BENCHMARKS[name].runs_code for name in benchmarks):
        command.append("--confirm_run_unsafe_code")
    return command


def _check(benchmarks: Sequence[str], allow_code: bool, include_path: Path | None) -> None:
    if not benchmarks:
        raise InputError(f"no benchmark given; allowed: {', '.join(BENCHMARKS)}")
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise InputError(f"benchmark {name!r}: unknown; allowed: {', '.join(BENCHMARKS)}")
        if name in WITHOUT_TASK and include_path is None:
            raise InputError(
                f"benchmark {name}: lm-evaluation-harness (0.4.13) has no task for it; allowed: --include-path with a "
                f"folder that defines the task {BENCHMARKS[name].tasks[0]}, or the benchmark's own program"
            )
        if BENCHMARKS[name].runs_code and not allow_code:
            raise InputError(
                f"benchmark {name}: it executes code that the model wrote; allowed: --allow-code, in a place where "
                "that may do no harm"
            )


def run_lm_eval(model: Path, benchmarks: Sequence[str], out: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Runs the harness with its output on this terminal. Returns the numbers of its result file, by task.

    Raises InputError if it is not installed, and for what `lm_eval_command` refuses; RunError if it fails.
    """
    command = lm_eval_command(model, benchmarks, out, **options)
    beside = Path(sys.executable).parent / command[0]
    program = str(beside) if beside.is_file() else shutil.which(command[0])
    if program is None:
        raise InputError(
            f"{command[0]} is not installed, which measures {', '.join(benchmarks)}; install it: {INSTALL}"
        )
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.rglob("results_*.json"))
    status = subprocess.run([program, *command[1:]], check=False).returncode
    if status != 0:
        raise RunError(f"lm_eval ended with exit status {status}")
    written = sorted(set(out.rglob("results_*.json")) - before, key=lambda path: path.stat().st_mtime)
    if not written:
        raise RunError(f"lm_eval left no results_*.json under {out}")
    return read_lm_eval_results(written[-1])


def read_lm_eval_results(path: Path) -> dict[str, dict[str, float]]:
    """Task -> metric -> value of a result file, without standard errors and descriptions."""
    results = json.loads(path.read_text())["results"]
    return {
        task: {
            metric: float(value)
            for metric, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric
        }
        for task, values in results.items()
    }
