"""Which layouts can hold a model: every rule, once, for the configuration, the weight sync and the planner. Pure.

Each function yields one line a problem: key, found, allowed.
"""

from collections.abc import Iterator
from typing import Protocol

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.stages import divide_layers
from megatron_coreward.errors import InputError

VLLM_VOCAB_MULTIPLE = 64  # vLLM pads the vocabulary to a multiple of this before it cuts it


class ActorSizes(Protocol):
    """Sizes of the actor's layout: `config.schema.ActorSettings`, `weights.layouts.ActorLayout`."""

    @property
    def tensor_parallel(self) -> int: ...
    @property
    def pipeline_parallel(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int: ...
    @property
    def expert_parallel(self) -> int: ...
    @property
    def expert_tensor_parallel(self) -> int | None: ...
    @property
    def data_parallel(self) -> int: ...
    @property
    def context_parallel(self) -> int: ...
    @property
    def first_stage_layers(self) -> int | None: ...
    @property
    def last_stage_layers(self) -> int | None: ...


def pipeline_problems(a: ActorSizes) -> Iterator[str]:
    """Keys of pipelines without a pipeline."""
    if a.virtual_pipeline > 1 and a.pipeline_parallel == 1:
        yield f"actor.virtual_pipeline: {a.virtual_pipeline} needs actor.pipeline_parallel of 2 or more, found 1"
    for key in ("first_stage_layers", "last_stage_layers"):
        if a.pipeline_parallel == 1 and getattr(a, key) is not None:
            yield f"actor.{key}: {getattr(a, key)} needs actor.pipeline_parallel of 2 or more, found 1"


def expert_rank_problems(a: ActorSizes) -> Iterator[str]:
    """Expert parallelism against the ranks of a pipeline stage."""
    yield from divides(
        "the ranks of a pipeline stage, tensor x context x data parallel",
        a.tensor_parallel * a.context_parallel * a.data_parallel,
        "actor.expert_parallel x actor.expert_tensor_parallel",
        a.expert_parallel * _expert_tp(a),
    )


def stage_problems(a: ActorSizes, num_layers: int) -> Iterator[str]:
    """Layers against pipeline stages and their chunks."""
    try:
        sizes = divide_layers(num_layers, a.pipeline_parallel, a.first_stage_layers, a.last_stage_layers)
    except InputError as error:
        yield str(error)
        return
    if any(size % a.virtual_pipeline for size in sizes):
        yield (
            f"actor.virtual_pipeline: {a.virtual_pipeline} does not divide the layers of every pipeline stage "
            f"({', '.join(map(str, sorted(set(sizes))))})"
        )


def actor_problems(a: ActorSizes, arch: Architecture) -> Iterator[str]:
    """Why an actor of these sizes cannot hold the model."""
    tp = a.tensor_parallel
    yield from _attention("actor", tp, arch)
    fused_rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    yield from divides("the rows of the model's fused QKV", fused_rows, "actor.tensor_parallel", tp)
    yield from stage_problems(a, arch.num_layers)
    if arch.experts is None:
        yield from divides("the model's feed-forward size", arch.ffn_size, "actor.tensor_parallel", tp)
        if a.expert_parallel > 1:
            yield f"actor.expert_parallel: {a.expert_parallel} for a model without experts; allowed: 1"
        if a.expert_tensor_parallel is not None:
            yield f"actor.expert_tensor_parallel: {a.expert_tensor_parallel} for a model without experts; allowed: null"
        return
    yield from divides("the model's experts", arch.experts.num, "actor.expert_parallel", a.expert_parallel)
    yield from divides(
        "an expert's feed-forward size", arch.experts.ffn_size, "actor.expert_tensor_parallel", _expert_tp(a)
    )
    yield from expert_rank_problems(a)


def engine_problems(
    arch: Architecture, tensor_parallel: int, pipeline_parallel: int = 1, expert_parallel: bool = False
) -> Iterator[str]:
    """Why an engine of these sizes cannot hold the model."""
    key, tp = "rollout.tensor_parallel", tensor_parallel
    yield from _attention("rollout", tp, arch)
    padded = -(-arch.vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
    yield from divides("the model's vocabulary as vLLM pads it", padded, key, tp)
    if pipeline_parallel > arch.num_layers:
        yield (
            f"rollout.pipeline_parallel: {pipeline_parallel} stages for {arch.num_layers} layers; "
            f"allowed: 1 to {arch.num_layers}"
        )
    if arch.experts is None:
        yield from divides("the model's feed-forward size", arch.ffn_size, key, tp)
        if expert_parallel:
            yield "rollout.expert_parallel: true for a model without experts; allowed: false"
    elif tp > arch.experts.num:
        yield f"{key}: {tp} is more than the model's experts; allowed: 1 to {arch.experts.num}"
    elif not expert_parallel:
        yield from divides("an expert's feed-forward size", arch.experts.ffn_size, key, tp)


def divides(what: str, number: int, key: str, divisor: int) -> Iterator[str]:
    """A problem if `divisor`, the value of `key`, does not divide `number`."""
    if number % divisor:
        fits = [d for d in range(1, number + 1) if number % d == 0]
        yield f"{key}: {divisor} does not divide {what} ({number}); allowed: {', '.join(map(str, fits[:12]))}"


def refuse_first(problems: Iterator[str]) -> None:
    """Raises InputError with the first problem, if there is one."""
    for problem in problems:
        raise InputError(problem)


def _attention(section: str, tp: int, arch: Architecture) -> Iterator[str]:
    yield from divides("the model's attention heads", arch.num_heads, f"{section}.tensor_parallel", tp)
    if arch.num_kv_heads % tp and tp % arch.num_kv_heads:
        yield (
            f"{section}.tensor_parallel: {tp} is neither a divisor nor a multiple of the model's key/value heads "
            f"({arch.num_kv_heads})"
        )


def _expert_tp(a: ActorSizes) -> int:
    return a.tensor_parallel if a.expert_tensor_parallel is None else a.expert_tensor_parallel
