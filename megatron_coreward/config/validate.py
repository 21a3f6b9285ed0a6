"""Combinations that cannot work, found before any process starts: layout against model, batch against layout, files.

Pure, except that it asks whether files exist. What needs more than that (contents of files, this machine, an
earlier run) is checked in `preflight`, which begins with what is here.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from megatron_coreward.config import accelerator, layout_rules
from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.methods import POLICY_VOTE_METHODS, method_title, needs_of, parts_of
from megatron_coreward.config.needs import Needs
from megatron_coreward.config.schema import LossSettings, RunConfig, ValidationSettings
from megatron_coreward.errors import InputError

GSPO_CLIP = 0.01  # bound above which a clipped sequence ratio is a mistake rather than a choice
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


def warnings(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """What may go wrong and is not refused."""
    if arch.experts is not None and config.loss.mismatch_correction == "off":
        yield (
            "loss.mismatch_correction: off for a mixture of experts: engines and actors route some tokens to other "
            "experts, and the loss takes that for the policy's; tis or icepop corrects it"
        )
    if config.loss.objective == "gspo":
        yield from _gspo_warnings(config.loss)


def _gspo_warnings(loss: LossSettings) -> Iterator[str]:
    """Of bounds and an aggregation that are made for the ratios of tokens."""
    if loss.clip_high > GSPO_CLIP:
        yield (
            f"loss.clip_high: {loss.clip_high} with loss.objective: gspo, whose ratio is that of a whole sequence, to "
            f"the power of 1 / its length; above {GSPO_CLIP} hardly anything is clipped (its paper has 4e-4)"
        )
    if loss.aggregation != "seq-mean-token-mean":
        yield (
            f"loss.aggregation: {loss.aggregation} with loss.objective: gspo, which its paper aggregates by "
            "seq-mean-token-mean, so that every sequence weighs the same"
        )


def model_problems(config: RunConfig, arch: Architecture) -> Iterator[str]:
    """What the model cannot do under this config."""
    a = config.actor
    yield from layout_rules.actor_problems(a, arch)
    if arch.experts is not None and a.tensor_parallel > 1 and not a.sequence_parallel:
        yield "actor.sequence_parallel: Megatron needs true for a mixture of experts under tensor parallelism"
    if arch.experts is None and a.router_replay != "off":
        yield f"actor.router_replay: {a.router_replay}, but the model has no experts; allowed: off"
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
    yield from _vote_problems(config)
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
    views = len(needs_of(config.method).views)
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
    needs, title = needs_of(config.method), method_title(config.method)
    if "rephrased" in needs.all_views and not config.data.rephrased_files and config.data.online_rephrasing == "off":
        yield f"data.rephrased_files: method {title} needs rephrased questions, none are given"
    yield from _rephrasing_problems(config, needs, title)
    if not needs.teacher and loss.kl_reference == "teacher":
        yield f"loss.kl_reference: teacher, but method {title} keeps none; allowed: frozen, auto"
    if guard in ("raise_kl", "rollback") and not loss.kl_coef:
        yield f"guard.action: {guard} raises loss.kl_coef, which is 0; allowed: off, warn, stop, or a KL term"
    if guard == "freeze_teacher" and not needs.teacher:
        yield f"guard.action: freeze_teacher, but method {title} keeps none"


def _rephrasing_problems(config: RunConfig, needs: Needs, title: str) -> Iterator[str]:
    """Of rewriting questions during training."""
    who = config.data.online_rephrasing
    if who == "off":
        return
    if config.rollout.resample_flat:
        yield (
            f"data.online_rephrasing: {who} rewrites the batch of a step before it is sampled; rollout.resample_flat, "
            f"which draws further questions afterwards, must be 0, found {config.rollout.resample_flat}"
        )
    if "rephrased" not in needs.all_views:
        yield f"data.online_rephrasing: {who}, but method {title} reads no rephrased questions; allowed: off"
    if who == "teacher" and not needs.teacher:
        yield f"data.online_rephrasing: teacher, but method {title} keeps none; allowed: off, policy"
    for key, value in (
        ("rollout.max_staleness", config.rollout.max_staleness),
        ("teacher.lookahead", config.teacher.lookahead if needs.teacher else 0),
    ):
        if value:
            yield (
                f"data.online_rephrasing: {who} writes the questions of a step while the step before it is at hand, so "
                f"they cannot be answered ahead of that; {key} must be 0, found {value}"
            )


def _vote_problems(config: RunConfig) -> Iterator[str]:
    """Of votes on more, or on less, than what is trained on."""
    r, needs, title = config.rollout, needs_of(config.method), method_title(config.method)
    if config.teacher.early_stop and not needs.teacher:
        yield f"teacher.early_stop: true, but method {title} keeps no teacher whose votes could end; allowed: false"
    elif config.teacher.early_stop and r.schedule != "streaming":
        yield (
            "teacher.early_stop: true needs rollout.schedule: streaming, in which samples are seen as they end; found "
            f"{r.schedule}"
        )
    ahead = {"rollout.max_staleness": r.max_staleness, "teacher.lookahead": config.teacher.lookahead}
    for key, value in ahead.items():
        if r.resample_flat and value:
            yield (
                f"rollout.resample_flat: {r.resample_flat} draws further questions within a step, so later ones must "
                f"not be on their way; found {key}: {value}, allowed: 0"
            )
    if r.votes is None:
        return
    if r.votes < r.n:
        yield f"rollout.votes: found {r.votes}; allowed: at least rollout.n ({r.n}), which are chosen from them"
    if needs.token_stats or not any(name in POLICY_VOTE_METHODS for name, _ in parts_of(config.method)):
        allowed = " and ".join(sorted(POLICY_VOTE_METHODS))
        instead = "; teacher.n is the number of the teacher's votes" if needs.teacher else ""
        yield (
            f"rollout.votes: found {r.votes} with method {title}; allowed: null, or the methods {allowed} alone, for "
            f"which more votes than rollouts are supported{instead}"
        )


def _staleness_problems(config: RunConfig) -> Iterator[str]:
    """Of rollouts from other weights than those that learn, and of who draws them."""
    r, own = config.rollout, config.teacher.engines
    asked = [
        *([f"rollout.max_staleness: {r.max_staleness}"] if r.max_staleness else []),
        *(["rollout.partial: true"] if r.partial else []),
        *(["rollout.quantization: fp8"] if r.quantization == "fp8" else []),
        *([f"rollout.top_p: {r.top_p}"] if r.top_p < 1 else []),
        *([f"rollout.top_k: {r.top_k}"] if r.top_k else []),
    ]
    if asked and config.loss.mismatch_correction == "off":
        yield (
            f"loss.mismatch_correction: off, but {' and '.join(asked)} samples from a distribution that is not the one "
            "that learns; allowed: tis, icepop"
        )
    if r.max_staleness and r.placement == "colocated":
        yield (
            f"rollout.max_staleness: {r.max_staleness} needs engines that run while actors learn; found "
            "rollout.placement: colocated, in which one side sleeps while the other computes"
        )
    if r.max_staleness > 1 and r.schedule == "deterministic":
        yield f"rollout.max_staleness: {r.max_staleness} needs rollout.schedule: streaming; deterministic has 0 and 1"
    if r.partial and not (r.max_staleness and r.schedule == "streaming"):
        yield (
            "rollout.partial: true needs rollout.schedule: streaming and rollout.max_staleness of 1 or more, since "
            f"otherwise nothing is in flight when weights change; found {r.schedule} and {r.max_staleness}"
        )
    if config.actor.router_replay != "off" and r.schedule == "streaming":
        yield (
            "actor.router_replay: rollout reads the experts of whole batches; found rollout.schedule: streaming, "
            "allowed: deterministic"
        )
    if own and not needs_of(config.method).teacher:
        yield f"teacher.engines: {own}, but method {method_title(config.method)} keeps no teacher; allowed: 0"
    elif own and own >= r.num_engines:
        yield (
            f"teacher.engines: {own} of rollout.num_engines: {r.num_engines} leave none for the policy; allowed: 0 to "
            f"{r.num_engines - 1}"
        )
    if own and r.placement == "colocated":
        yield (
            f"teacher.engines: {own} are for engines with GPUs of their own; found rollout.placement: colocated, "
            "allowed: 0"
        )


def _bound_problems(config: RunConfig) -> Iterator[str]:
    """Of numbers that bound each other."""
    a, loss = config.actor, config.loss
    if loss.dual_clip is not None and loss.objective != "ppo":
        yield f"loss.dual_clip: is a bound of ppo alone, found loss.objective: {loss.objective}"
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
