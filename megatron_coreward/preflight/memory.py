"""Whether a run fits the memory of this machine, asked of the planner, and which key makes it fit.

Without GPUs all processes share the host's memory. What they hold is counted, and the largest micro-batch that the
config allows: an upper bound, which a run whose answers stay short does not reach, so a refusal says what long answers
would need. Libraries and the processes themselves (about 1 GiB each) are not counted. With GPUs the planner's peak of
every rank, its assumptions included, must fit what is free on the fullest of them now.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import GIB, GPUS, Assumptions
from megatron_coreward.planner.memory import activation_bytes, actor_memory, engine_memory, scoring_bytes
from megatron_coreward.planner.plan import Machine, actor_problems, engine_problems
from megatron_coreward.weights.buckets import ITEM_BYTES
from megatron_coreward.weights.layouts import ActorLayout, expert_number
from megatron_coreward.weights.mapping import hf_tensors

CPU_CHUNK_LOGITS = 1 << 24  # of actor.token_stats


def parameters(arch: Architecture) -> tuple[int, int]:
    """Numbers outside of experts and inside."""
    counts = [0, 0]
    for name, shape in hf_tensors(arch).items():
        size = 1
        for length in shape:
            size *= length
        counts[expert_number(name) is not None] += size
    return counts[0], counts[1]


def host_memory(config: RunConfig, arch: Architecture) -> dict[str, int]:
    """Bytes that a run takes on a machine without GPUs, over all its processes, by what takes them."""
    dense, expert = parameters(arch)
    a, r, needs = config.actor, config.rollout, needs_of(config.method)
    item = ITEM_BYTES[config.model.dtype]
    once = dense + expert
    # Replicas of a shard hold all of it; context-parallel ranks are replicas too.
    replicas, expert_tp = a.data_parallel * a.context_parallel, a.expert_tensor_parallel or a.tensor_parallel
    copies = replicas * dense + max(1, a.tensor_parallel * replicas // (a.expert_parallel * expert_tp)) * expert
    # Main parameters of an fp32 model are the model's own; two moments; value and compensation of the teacher.
    parts = {
        "weights and gradients": copies * (item + 4),
        "optimizer": once * (8 if item == 4 else 12),
        "teacher": (once * 8 + copies * item) if needs.teacher else 0,
        "frozen reference": copies * item if config.loss.kl_reference == "frozen" and config.loss.kl_coef else 0,
        "micro-batches (actor.tokens_per_microbatch)": _micro_batches(config, arch),
        "engines": r.num_engines * once * item,
        "key-value caches (rollout.kv_cache_gib)": int(r.num_engines * r.tensor_parallel * r.kv_cache_gib * GIB),
    }
    return {name: size for name, size in parts.items() if size}


def _micro_batches(config: RunConfig, arch: Architecture) -> int:
    """Activations of the largest micro-batches that can be in flight, and what scoring them takes, over all ranks."""
    a, item = config.actor, ITEM_BYTES[config.model.dtype]
    views = len(needs_of(config.method).views)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    batch = config.data.batch_size * views * config.rollout.n * longest // a.data_parallel
    a = a.model_copy(update={"tokens_per_microbatch": min(a.tokens_per_microbatch, max(longest, batch))})
    try:
        return ActorLayout.of(a).stage_size * sum(
            activation_bytes(arch, a, stage, item, Assumptions())
            + scoring_bytes(arch, a, stage, item, CPU_CHUNK_LOGITS)
            for stage in range(a.pipeline_parallel)
        )
    except InputError:  # a layout that cannot hold the model, which the checks of layouts report
        return 0


def host_problems(config: RunConfig, arch: Architecture, free: int) -> Iterator[str]:
    """Without GPUs: that the run needs more than the `free` bytes."""

    def needed(changed: RunConfig) -> int:
        return sum(host_memory(changed, arch).values())

    try:
        parts = host_memory(config, arch)
    except InputError:  # a layout that cannot hold the model, which other checks report
        return
    total = sum(parts.values())
    if total > free:
        largest = max(parts, key=lambda name: parts[name])
        remedy = _remedy(config, lambda changed: needed(changed) <= free)
        yield (
            f"memory: the run needs {_gib(total)} if answers are as long as they may be ({largest}: "
            f"{_gib(parts[largest])}), {_gib(free)} are available; {remedy}"
        )


def gpu_problems(config: RunConfig, arch: Architecture, free: int, total: int) -> Iterator[str]:
    """What the planner says does not fit GPUs of `total` bytes, of which `free` are free on the fullest. Engines take
    their share of the total."""
    gpu = replace(next(iter(GPUS.values())), name="this machine's", memory_bytes=total)  # its rates play no part here
    machine = Machine(gpu, config.rollout.placement, Assumptions(), free_bytes=free)

    def problems(changed: RunConfig) -> list[str]:
        try:
            stages = actor_memory(changed, arch, machine.assumptions)
            engine = engine_memory(changed, arch, gpu, machine.assumptions)
        except InputError:  # a layout that cannot hold the model, which other checks report
            return []
        found = actor_problems(stages, engine, machine)
        return [*found, *engine_problems(changed, stages, engine, machine)]

    found = problems(config)
    if found:
        remedy = _remedy(config, lambda changed: not problems(changed))
        yield from (f"memory: {problem}" for problem in found[:-1])
        yield f"memory: {found[-1]}; {remedy}"


def _remedy(config: RunConfig, fits: Callable[[RunConfig], bool]) -> str:
    """The smallest change of keys that makes the run fit, out of those that cost time alone."""
    for changes in _changes(config):
        parts: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            component, _, name = key.partition(".")
            parts.setdefault(component, {})[name] = value
        update = {name: getattr(config, name).model_copy(update=values) for name, values in parts.items()}
        if fits(config.model_copy(update=update)):
            return " ".join(f"{key}={value}" for key, value in changes.items()) + " makes it fit"
    return (
        "choose a smaller model, more GPUs or ranks (`megatron-coreward plan` proposes layouts), or fewer "
        "rollout.num_engines or actor.data_parallel"
    )


def _changes(config: RunConfig) -> Iterator[dict[str, Any]]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    half = config.actor.tokens_per_microbatch // 2
    fewer = [half >> k for k in range(half.bit_length()) if half >> k >= longest]
    if longest < config.actor.tokens_per_microbatch and longest not in fewer:
        fewer.append(longest)
    tokens: list[dict[str, Any]] = [{"actor.tokens_per_microbatch": number} for number in fewer]
    full = {"actor.recompute": "full"}
    caches = [{"rollout.kv_cache_gib": config.rollout.kv_cache_gib / 2**k} for k in (1, 2, 3)]
    shares = [{"rollout.gpu_memory_utilization": share / 20} for share in range(19, 1, -1)]
    yield from tokens
    yield full
    yield from caches
    yield from shares
    for number in tokens:
        yield {**number, **full}
    for share in shares:
        yield {**(tokens[-1] if tokens else {}), **full, **share}


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
