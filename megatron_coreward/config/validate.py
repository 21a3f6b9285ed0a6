"""Combinations that cannot work, found before any process starts: layout against model, batch against layout, files.

Pure but for asking whether files exist. What needs more than that (contents of files, this machine, an earlier run) is
checked in `preflight`, which begins with what is here.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from megatron_coreward.config import accelerator, layout_rules
from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.schema import (
    REPHRASED_METHODS,
    TEACHER_METHODS,
    TWO_VIEW_METHODS,
    RunConfig,
    ValidationSettings,
)
from megatron_coreward.errors import InputError

# Mean gap of log-probs between engine and actor that rounding alone may make; a limit below it refuses every sync.
LEAST_LOGPROB_GAP = {"float32": 1e-6, "bfloat16": 1e-3}  # nats


def validate(config: RunConfig) -> Architecture:
    """Checks a resolved config against the model and the files it names; returns the model's architecture.

    Raises:
        InputError: every problem found, one a line.
    """
    problems = [*setting_problems(config), *file_problems(config)]
    try:
        arch = read_architecture(config.model.hf_path)
    except InputError as e:
        raise InputError("\n".join([f"model.hf_path: {e}", *problems])) from None
    problems = [*model_problems(config, arch), *problems]
    if problems:
        raise InputError("\n".join(problems))
    return arch


def model_problems(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """What the model cannot do under this config."""
    a = config.actor
    yield from layout_rules.actor_problems(a, arch)
    if arch.experts is not None and a.tensor_parallel > 1 and not a.sequence_parallel:
        yield "actor.sequence_parallel: Megatron needs true for a mixture of experts under tensor parallelism"
    yield from layout_rules.engine_problems(arch, config.rollout.tensor_parallel)
    yield from _length(config, arch)
    yield from accelerator.model_problems(config, arch)


def _length(config: RunConfig, arch: Architecture) -> Iterator[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > arch.max_position:
        yield (
            f"data.max_prompt_tokens + rollout.max_response_tokens: {longest} tokens, the model has positions for "
            f"{arch.max_position}"
        )


def setting_problems(config: RunConfig) -> Iterator[str]:
    """What contradicts itself, whatever the model."""
    for key, value in numbers(config):
        if not math.isfinite(value):
            yield f"{key}: {value} is no finite number"
    yield from accelerator.setting_problems(config)
    yield from layout_rules.pipeline_problems(config.actor)
    yield from _batch_problems(config)
    yield from _method_problems(config)
    yield from _staleness_problems(config)
    yield from _bound_problems(config)
    if "@" in (config.telemetry.mlflow_uri or ""):
        yield (
            "telemetry.mlflow_uri: holds a user name or password, which the run directory would keep; allowed: an "
            "address without them, beside MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )
    best, scores = config.checkpoint.best_metric, score_names(config.validation)
    # A data set's own scores are named after its source, which only the file knows: val/<source>/<score> (preflight).
    if best is not None and best.startswith("val") and best.rpartition("/")[2] not in scores:
        allowed = ", ".join(f"val/{score}" for score in scores)
        yield f"checkpoint.best_metric: found {best!r}, which no validation has; allowed: {allowed}"
    elif best is not None and best.startswith("val/") and not config.data.val_files:
        yield f"checkpoint.best_metric: {best} needs data.val_files, none are given"


def _batch_problems(config: RunConfig) -> Iterator[str]:
    """Of how a batch is divided among ranks, micro-batches and updates."""
    a, r, loss = config.actor, config.rollout, config.loss
    if a.sequence_parallel and a.tensor_parallel == 1:
        yield "actor.sequence_parallel: true needs actor.tensor_parallel of 2 or more, found 1"
    longest = config.data.max_prompt_tokens + r.max_response_tokens
    if longest > a.tokens_per_microbatch:
        yield (
            f"actor.tokens_per_microbatch: {a.tokens_per_microbatch} does not hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
        )
    views = 2 if config.method in TWO_VIEW_METHODS else 1
    sequences = config.data.batch_size * views * r.n
    if sequences < a.data_parallel:
        yield f"actor.data_parallel: {a.data_parallel} ranks for a batch of {sequences} sequences"
    if config.data.batch_size * views % loss.updates_per_batch:
        yield (
            f"loss.updates_per_batch: {loss.updates_per_batch} does not divide the batch's groups "
            f"({config.data.batch_size * views})"
        )
    elif loss.views == "sum" and views == 2 and config.data.batch_size % loss.updates_per_batch:
        yield (
            f"loss.updates_per_batch: {loss.updates_per_batch} does not divide data.batch_size "
            f"({config.data.batch_size}), so the two views of a question would fall into different updates; "
            "loss.views: sum needs both in one"
        )


def _method_problems(config: RunConfig) -> Iterator[str]:
    """Of what a method has and what other keys ask of it."""
    loss, guard = config.loss, config.guard.action
    if config.method in REPHRASED_METHODS and not config.data.rephrased_files:
        yield f"data.rephrased_files: method {config.method} needs rephrased questions, none are given"
    if config.method not in TEACHER_METHODS and loss.kl_reference == "teacher":
        yield f"loss.kl_reference: teacher, but method {config.method} keeps none; allowed: frozen, auto"
    if guard in ("raise_kl", "rollback") and not loss.kl_coef:
        yield f"guard.action: {guard} raises loss.kl_coef, which is 0; allowed: off, warn, stop, or a KL term"
    if guard == "freeze_teacher" and config.method not in TEACHER_METHODS:
        yield f"guard.action: freeze_teacher, but method {config.method} keeps none"


def _staleness_problems(config: RunConfig) -> Iterator[str]:
    r, loss = config.rollout, config.loss
    if r.max_staleness and loss.mismatch_correction == "off":
        yield (
            "rollout.max_staleness: 1 samples from older weights; it needs loss.mismatch_correction of tis or icepop, "
            "found off"
        )
    if r.max_staleness and r.placement == "colocated":
        yield "rollout.max_staleness: 1 needs engines that run while actors learn; found rollout.placement: colocated"


def _bound_problems(config: RunConfig) -> Iterator[str]:
    """Of numbers that bound each other."""
    a, loss = config.actor, config.loss
    if loss.kl_clamp is not None and loss.kl_estimator != "k3":
        yield f"loss.kl_clamp: bounds the estimator k3 alone, found loss.kl_estimator: {loss.kl_estimator}"
    if config.teacher.decay_start > config.teacher.decay_end:
        yield (
            f"teacher.decay_start: {config.teacher.decay_start} is above teacher.decay_end "
            f"({config.teacher.decay_end}); the decay grows"
        )
    if a.min_lr > a.lr:
        yield f"actor.min_lr: {a.min_lr} is above actor.lr ({a.lr})"
    if loss.clip_high < loss.clip_low:
        yield f"loss.clip_high: {loss.clip_high} is below loss.clip_low ({loss.clip_low})"
    gap, least = config.sync.max_logprob_gap, LEAST_LOGPROB_GAP[config.model.dtype]
    if gap is not None and gap < least:
        yield (
            f"sync.max_logprob_gap: {gap} is less than rounding makes of model.dtype {config.model.dtype}; "
            f"allowed: {least} or more, or null"
        )


def score_names(validation: ValidationSettings) -> list[str]:
    """What a validation measures: pass@1 of the greedy answers; avg@n, pass@n and maj@n of the random ones."""
    greedy = ["pass@1"] if validation.samples != "random" else []
    if validation.samples == "greedy":
        return greedy
    n = validation.n
    return [*greedy, f"avg@{n}", *([f"pass@{n}"] if n > 1 else []), f"maj@{n}"]


def numbers(component: BaseModel, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a config with its key."""
    for name in type(component).model_fields:
        value = getattr(component, name)
        if isinstance(value, BaseModel):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", value


def file_problems(config: RunConfig) -> Iterator[str]:
    """Files that are missing, given twice, or in the way."""
    groups = {
        "data.train_files": config.data.train_files,
        "data.rephrased_files": config.data.rephrased_files,
        "data.val_files": config.data.val_files,
    }
    model = config.model
    if model.megatron_path is not None:
        if not any(
            (folder / "metadata.json").is_file() for folder in (model.megatron_path, model.megatron_path / "megatron")
        ):
            yield f"model.megatron_path: {model.megatron_path} is no Megatron distributed checkpoint (no metadata.json)"
    elif model.hf_path.is_dir() and not any(model.hf_path.glob("*.safetensors")):
        yield f"model.hf_path: no *.safetensors files in {model.hf_path}"
    for key, files in groups.items():
        for place, file in enumerate(files):
            if not file.is_file():
                yield f"{key}: {file} does not exist"
            elif file in files[:place]:
                yield f"{key}: {file} is given twice"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        yield f"run_dir: {config.run_dir} is a file"
    for key, path in (("model.hf_path", model.hf_path), ("model.megatron_path", model.megatron_path)):
        if path is not None and _overwritten(config.run_dir, path):
            yield f"run_dir: {config.run_dir} would overwrite {key} {path}; choose another run_dir"


def _overwritten(run_dir: Path, path: Path) -> bool:
    """Whether a run writes where it would read from."""
    ours = Path(os.path.realpath(run_dir))
    return Path(os.path.realpath(path)) in (ours, ours / "hf")
