"""The paper's evaluation of one model (arXiv 2508.00410, section 4.1): every benchmark whose data is there.

OUT/paper.json      each benchmark's number with its interval, and why others were not measured
OUT/<benchmark>/    the evaluation of each mathematical one (`evaluation.evaluate`)
OUT/lm_eval/        the others (`evaluation.lm_eval`)

Temperature 0.8; one sample for each question of MATH500 and GSM8K, eight of AMC, whose mean is reported. What was
sampled is not sampled again, so a killed evaluation is started with the same command. paper.json is written after each
benchmark, and keeps what an earlier call under the same settings has measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_coreward.algorithms.accuracy import Estimate
from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.methods import method_title
from megatron_coreward.config.schema import SYSTEM_PROMPT
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.benchmarks import BENCHMARKS, TEMPERATURE, HarnessBenchmark, MathBenchmark, missing
from megatron_coreward.evaluation.evaluate import (
    Converter,
    Engines,
    GradingSettings,
    Sampling,
    evaluate_files,
    hf_model_dir,
)
from megatron_coreward.evaluation.json_files import read_json, write_json
from megatron_coreward.evaluation.lm_eval import run_lm_eval

FORMAT = 1
FILE_NAME = "paper.json"
UNTRAINED = "untrained"  # the method of a model before training

Progress = Callable[[str, int, int], None]  # (benchmark, questions done, questions in all)


@dataclass(frozen=True, slots=True)
class ModelLabels:
    """The row of a model in the paper's table."""

    model: str  # the base model, without its owner
    data: str  # the training set, as recipes call it; empty before training
    method: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A benchmark's number: a share in 0..1 with its 95% interval over questions."""

    metric: str
    estimate: Estimate
    num_questions: int


@dataclass(frozen=True, slots=True)
class PaperResult:
    """One model on the paper's benchmarks."""

    labels: ModelLabels
    measured: Mapping[str, Measured]  # by benchmark
    not_measured: Mapping[str, str]  # by benchmark: why, and what to do about it
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PaperSettings:
    """What the paper leaves open, or a smaller evaluation changes."""

    max_tokens: int = 3072  # of an answer
    seed: int = 0
    limit: int | None = None  # only the first questions of each benchmark (of each task of the harness)
    thinking: bool | None = None  # see `data.prompts.build_prompts`
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


def evaluate_paper(
    model: Path,
    out: Path,
    engines: Engines,
    *,
    data: Path,
    labels: ModelLabels,
    settings: PaperSettings,
    benchmarks: Sequence[str] = tuple(BENCHMARKS),
    allow_code: bool = False,
    convert: Converter | None = None,
    on_progress: Progress = lambda benchmark, done, total: None,
) -> PaperResult:
    """Measures a model on every benchmark that can run, and leaves paper.json in `out`.

    Args:
        data: the folder of `evaluation.benchmarks`.
        convert: see `evaluation.evaluate.hf_model_dir`.

    Raises InputError for unknown benchmarks, if none can run, and if `out` has a result of another model or under other
    settings.
    """
    if unknown := [name for name in benchmarks if name not in BENCHMARKS]:
        raise InputError(f"benchmark {unknown[0]!r}: unknown; allowed: {', '.join(BENCHMARKS)}")
    reasons = {name: missing(name, data, allow_code=allow_code) for name in benchmarks}
    not_measured = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(not_measured) == len(reasons):
        raise InputError("\n  ".join(["no benchmark can run:", *(f"{n}: {r}" for n, r in not_measured.items())]))
    possible = [name for name in reasons if name not in not_measured]
    run = {"temperature": TEMPERATURE, **asdict(settings)}
    result = _with(_earlier(out, labels, run), {}, not_measured)
    with hf_model_dir(model, convert) as hf_path:
        for name in possible:
            benchmark = BENCHMARKS[name]
            if isinstance(benchmark, MathBenchmark):
                found = _mathematics(
                    benchmark, data, hf_path, out / name, engines, settings, str(model), partial(on_progress, name)
                )
                result = _with(result, {name: found})
                write_paper_result(out / FILE_NAME, result)
        if others := [name for name in possible if isinstance(BENCHMARKS[name], HarnessBenchmark)]:
            stop_ray()  # the harness's process starts its own
            rows = run_lm_eval(
                hf_path,
                others,
                out / "lm_eval",
                engines,
                data=data,
                temperature=TEMPERATURE,
                top_p=1.0,
                allow_code=allow_code,
                **asdict(settings),
            )
            result = _with(result, {name: _read_measured(row) for name, row in rows.items()})
            write_paper_result(out / FILE_NAME, result)
    return result


def _earlier(out: Path, labels: ModelLabels, settings: Mapping[str, Any]) -> PaperResult:
    """What is in `out` already. Raises InputError if it is of another model or under other settings."""
    if not (out / FILE_NAME).exists():
        return PaperResult(labels, {}, {}, settings)
    earlier = read_paper_result(out)
    for what, before, now in (
        *(("model", getattr(earlier.labels, key), value) for key, value in asdict(labels).items()),
        *((key, earlier.settings.get(key), value) for key, value in settings.items()),
    ):
        if before != now:
            raise InputError(
                f"{out / FILE_NAME}: found a result of another evaluation ({what}: {before}, and {now} now); "
                "allowed: the same model and settings, or another folder"
            )
    return earlier


def _with(
    result: PaperResult, measured: Mapping[str, Measured], not_measured: Mapping[str, str] | None = None
) -> PaperResult:
    """A result with further numbers, in the order of the table."""
    known = {**result.measured, **measured}
    reasons = {**result.not_measured, **(not_measured or {})}
    return PaperResult(
        result.labels,
        {name: known[name] for name in BENCHMARKS if name in known},
        {name: reasons[name] for name in BENCHMARKS if name in reasons and name not in known},
        result.settings,
    )


def _mathematics(
    benchmark: MathBenchmark,
    data: Path,
    hf_path: Path,
    out: Path,
    engines: Engines,
    settings: PaperSettings,
    name: str,
    on_progress: Callable[[int, int], None],
) -> Measured:
    sampling = Sampling(
        n=benchmark.samples,
        temperature=TEMPERATURE,
        max_tokens=settings.max_tokens,
        greedy=False,
        seed=settings.seed,
        dtype=settings.dtype,
    )
    result = evaluate_files(
        hf_path,
        [data / benchmark.file],
        out,
        sampling,
        GradingSettings(),
        engines,
        system_prompt=SYSTEM_PROMPT,
        thinking=settings.thinking,
        max_problems=settings.limit,
        name=name,
        on_progress=on_progress,
    )
    return Measured(benchmark.metric, result.metrics()[benchmark.metric], len(result.questions))


def model_labels(
    model: Path, base: str | None = None, data: str | None = None, method: str | None = None
) -> ModelLabels:
    """The given labels; the others come from the config of the run directory that the model is in, if it is in one.

    Without a run, the model is its folder's name, untrained.
    """
    found = [folder / "config.yaml" for folder in list(model.resolve().parents)[:2]]
    run = next((path for path in found if path.is_file()), None)
    if run is None:
        return ModelLabels(base or model.resolve().name, data or "", method or UNTRAINED)
    config = yaml.safe_load(run.read_text())
    trained_on = Path(config["data"]["train_files"][0]).parent.name.replace("-", "_")
    return ModelLabels(
        base or Path(config["model"]["hf_path"]).name, data or trained_on, method or method_title(config["method"])
    )


def write_paper_result(path: Path, result: PaperResult) -> None:
    """Writes the JSON file, whole or not at all."""
    content = {
        "format": FORMAT,
        "labels": asdict(result.labels),
        "measured": {
            name: {"metric": m.metric, "num_questions": m.num_questions, **asdict(m.estimate)}
            for name, m in result.measured.items()
        },
        "not_measured": dict(result.not_measured),
        "settings": dict(result.settings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def read_paper_result(path: Path) -> PaperResult:
    """Reads the file, or the one in a folder. Raises InputError if it is missing or of another form."""
    return read_json(path, FILE_NAME, "result of `evaluate paper`", FORMAT, _from_json)


def _from_json(content: Mapping[str, Any]) -> PaperResult:
    measured = {name: _read_measured(row) for name, row in content["measured"].items()}
    return PaperResult(ModelLabels(**content["labels"]), measured, content["not_measured"], content["settings"])


def _read_measured(row: Mapping[str, Any]) -> Measured:
    return Measured(row["metric"], Estimate(row["value"], row["low"], row["high"]), row["num_questions"])
