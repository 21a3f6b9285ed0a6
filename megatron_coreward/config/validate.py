"""Combinations that cannot work, found before any process starts: layout against model, batch against layout, files."""

from collections.abc import Iterator

from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.schema import REPHRASED_METHODS, TEACHER_METHODS, RunConfig
from megatron_coreward.errors import InputError


def validate(config: RunConfig) -> Architecture:
    """Checks a resolved config against the model and the files it names; returns the model's architecture.

    Raises:
        InputError: every problem found, one a line.
    """
    try:
        arch = read_architecture(config.model.hf_path)
    except InputError as e:
        raise InputError(f"model.hf_path: {e}") from None
    problems = [*_layout(config, arch), *_rollout(config, arch), *_method(config), *_files(config)]
    if problems:
        raise InputError("\n".join(problems))
    return arch


def _divides(what: str, number: int, key: str, divisor: int) -> Iterator[str]:
    if number % divisor:
        fits = [d for d in range(1, number + 1) if number % d == 0]
        yield f"{key}: {divisor} does not divide {what} ({number}); allowed: {', '.join(map(str, fits[:12]))}"


def _layout(config: RunConfig, arch: Architecture) -> Iterator[str]:
    a = config.actor
    tp, pp, vpp = a.tensor_parallel, a.pipeline_parallel, a.virtual_pipeline
    yield from _divides("the model's attention heads", arch.num_heads, "actor.tensor_parallel", tp)
    if arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        yield (
            f"actor.tensor_parallel: {tp} is neither a divisor nor a multiple of the model's key/value heads "
            f"({arch.num_kv_heads})"
        )
    fused_rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    yield from _divides("the rows of the model's fused QKV", fused_rows, "actor.tensor_parallel", tp)
    yield from _divides("the model's feed-forward size", arch.ffn_size, "actor.tensor_parallel", tp)
    yield from _divides(
        "the model's layers", arch.num_layers, "actor.pipeline_parallel x actor.virtual_pipeline", pp * vpp
    )
    if vpp > 1 and pp == 1:
        yield f"actor.virtual_pipeline: {vpp} needs actor.pipeline_parallel of 2 or more, found 1"
    if a.context_parallel > 1:
        yield f"actor.context_parallel: {a.context_parallel} is not supported yet; allowed: 1"
    if a.sequence_parallel and tp == 1:
        yield "actor.sequence_parallel: true needs actor.tensor_parallel of 2 or more, found 1"
    if arch.experts is None:
        if a.expert_parallel > 1:
            yield f"actor.expert_parallel: {a.expert_parallel} for a model without experts; allowed: 1"
        return
    yield from _divides("the model's experts", arch.experts.num, "actor.expert_parallel", a.expert_parallel)
    yield from _divides("an expert's feed-forward size", arch.experts.ffn_size, "actor.tensor_parallel", tp)
    yield from _divides("actor.data_parallel", a.data_parallel, "actor.expert_parallel", a.expert_parallel)
    if tp > 1 and not a.sequence_parallel:
        yield "actor.sequence_parallel: Megatron needs true for a mixture of experts under tensor parallelism"


def _rollout(config: RunConfig, arch: Architecture) -> Iterator[str]:
    r = config.rollout
    yield from _divides("the model's attention heads", arch.num_heads, "rollout.tensor_parallel", r.tensor_parallel)
    longest = config.data.max_prompt_tokens + r.max_response_tokens
    if longest > arch.max_position:
        yield (
            f"data.max_prompt_tokens + rollout.max_response_tokens: {longest} tokens, the model has positions for "
            f"{arch.max_position}"
        )
    if longest > config.actor.tokens_per_microbatch:
        yield (
            f"actor.tokens_per_microbatch: {config.actor.tokens_per_microbatch} does not hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
        )
    views = 2 if config.method in REPHRASED_METHODS else 1
    sequences = config.data.batch_size * views * r.n
    if sequences < config.actor.data_parallel:
        yield f"actor.data_parallel: {config.actor.data_parallel} ranks for a batch of {sequences} sequences"
    if config.data.batch_size * views % config.loss.updates_per_batch:
        yield (
            f"loss.updates_per_batch: {config.loss.updates_per_batch} does not divide the batch's groups "
            f"({config.data.batch_size * views})"
        )


def _method(config: RunConfig) -> Iterator[str]:
    rephrased = config.method in REPHRASED_METHODS
    if rephrased and not config.data.rephrased_files:
        yield f"data.rephrased_files: method {config.method} needs rephrased questions, none are given"
    if config.method not in TEACHER_METHODS and config.loss.kl_reference == "teacher":
        yield f"loss.kl_reference: teacher, but method {config.method} keeps none; allowed: frozen, auto"
    if config.teacher.decay_start > config.teacher.decay_end:
        yield (
            f"teacher.decay_start: {config.teacher.decay_start} is above teacher.decay_end "
            f"({config.teacher.decay_end}); the decay grows"
        )
    if config.actor.min_lr > config.actor.lr:
        yield f"actor.min_lr: {config.actor.min_lr} is above actor.lr ({config.actor.lr})"
    if config.loss.clip_high < config.loss.clip_low:
        yield f"loss.clip_high: {config.loss.clip_high} is below loss.clip_low ({config.loss.clip_low})"


def _files(config: RunConfig) -> Iterator[str]:
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
    elif not any(model.hf_path.glob("*.safetensors")):
        yield f"model.hf_path: no *.safetensors files in {model.hf_path}"
    for key, files in groups.items():
        for file in files:
            if not file.is_file():
                yield f"{key}: {file} does not exist"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        yield f"run_dir: {config.run_dir} is a file"
