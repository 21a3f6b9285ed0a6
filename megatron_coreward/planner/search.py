"""Layouts that fit: enumerated, planned, ranked by predicted seconds a step; and the nearest to one that does not.

Actor and engines hardly depend on each other: for each way to divide the GPUs between them, the best actor and the best
engines are found apart. What is enumerated (`Space`) are sizes that divide; powers of two if nothing else says more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import log2
from typing import Any

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.stages import balanced_ends
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import Assumptions
from megatron_coreward.planner.plan import (
    Machine,
    Placement,
    Plan,
    actor_problems,
    engine_problems,
    fixed_problems,
    layout_of,
    make_plan,
)
from megatron_coreward.planner.step_time import head_layers

MAX_PIPELINE = 16
MAX_GPUS = 4096
OF_MICRO_BATCHES = ("recompute", "tokens_per_microbatch")  # keys that change no parameter's place
UTILIZATION = 0.9  # of a GPU that an engine has for itself
HEADROOM = 0.05  # share of a GPU that stays free: what a plan assumes may be off by as much


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs of the actor and of the engines; colocated, both are all of them."""

    actor: int
    engines: int


def splits(num_gpus: int, placement: Placement) -> list[Split]:
    if placement == "colocated":
        return [Split(num_gpus, num_gpus)]
    eighth = max(1, num_gpus // 8)
    return [Split(n, num_gpus - n) for n in range(eighth, num_gpus, eighth)]


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


def actor_layouts(config: RunConfig, arch: Architecture, ranks: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """Changes of `actor` keys that lay the model over this many ranks or a few less; not all of them are allowed."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    least = 2 ** (longest - 1).bit_length()
    head = head_layers(arch, config, Assumptions())
    for tp, pp in product(_powers(gpus_per_node), range(1, MAX_PIPELINE + 1)):
        most = ranks // (tp * pp)
        if not most:
            continue
        for dp in data_parallel_sizes(most) if arch.experts is not None else [most]:
            of_experts = list(_expert_layouts(arch, tp, tp * dp))
            for vpp in (1, 2, 4) if pp > 1 else (1,):
                for first, last in _splits(arch.num_layers, pp, vpp, head):
                    for (ep, expert_tp), recompute, times in product(of_experts, ("none", "full"), (1, 2, 4, 8)):
                        yield {
                            "tensor_parallel": tp,
                            "pipeline_parallel": pp,
                            "virtual_pipeline": vpp,
                            "first_stage_layers": first,
                            "last_stage_layers": last,
                            "expert_parallel": ep,
                            "expert_tensor_parallel": expert_tp,
                            "context_parallel": 1,
                            "data_parallel": dp,
                            "sequence_parallel": tp > 1,
                            "recompute": recompute,
                            "tokens_per_microbatch": times * least,
                        }


def _expert_layouts(arch: Architecture, tensor_parallel: int, stage_ranks: int) -> Iterator[tuple[int, int | None]]:
    """Expert-parallel and expert-tensor-parallel sizes: whole experts, or as much cut as the rest of a layer."""
    if arch.experts is None:
        yield 1, None
        return
    for expert_tp in sorted({1, tensor_parallel}):
        yield from ((ep, expert_tp) for ep in _powers(arch.experts.num) if stage_ranks % (ep * expert_tp) == 0)


def _splits(num_layers: int, stages: int, chunks: int, head: float) -> Iterator[tuple[int | None, int | None]]:
    """Layers of the first and last pipeline stage: all alike, and such that the last one has time for the head."""
    even = num_layers % (stages * chunks) == 0
    if even:
        yield None, None
    if stages > 1:
        balanced = balanced_ends(num_layers, stages, head, chunks)
        if balanced is not None and not (even and set(balanced) == {num_layers // stages}):
            yield balanced


def data_parallel_sizes(most: int) -> list[int]:
    """The largest size, and the largest ones that powers of two divide: experts are spread over them."""
    return sorted({most // power * power for power in _powers(most)}, reverse=True)


def engine_layouts(workers: int, gpus_per_node: int, utilization: float) -> Iterator[dict[str, Any]]:
    """Changes of `rollout` keys that lay engines over this many GPUs or a few less."""
    for tp in _powers(gpus_per_node):
        if workers >= tp:
            for sequences in (256, 512, 1024):
                yield {
                    "num_engines": workers // tp,
                    "tensor_parallel": tp,
                    "max_num_seqs": sequences,
                    "gpu_memory_utilization": utilization,
                }


def _with(config: RunConfig, **parts: dict[str, Any]) -> RunConfig:
    changed = {name: getattr(config, name).model_copy(update=changes) for name, changes in parts.items()}
    return config.model_copy(update=changed)


Rank = Callable[[Plan, float], Any]  # a plan and the seconds of its step -> the smaller the better


def search(
    config: RunConfig, arch: Architecture, machine: Machine, num_gpus: int, rank: Rank = lambda plan, seconds: seconds
) -> list[Plan]:
    """Plans that fit and leave `HEADROOM` free, best first: one for each way to divide the GPUs and each tensor- and
    pipeline-parallel size.

    Args:
        num_gpus: there are; a layout may leave some of them unused if none that uses more is as good.
        rank: of a plan and its seconds, the smaller the better. While engines and actor are chosen apart, the seconds
            are those of phases that follow each other: of two that overlap, the longer would hide the other.
    """

    def apart(plan: Plan) -> Any:
        return rank(plan, plan.phase_seconds)

    def whole(plan: Plan) -> Any:
        return rank(plan, plan.seconds)

    per_node = machine.assumptions.gpus_per_node
    roomy = replace(machine, free_bytes=int((1 - HEADROOM) * machine.room))
    found = []
    for split in splits(num_gpus, machine.placement):
        actors: dict[tuple[int, int], Plan] = {}
        too_large: set[tuple[Any, ...]] = set()  # layouts whose parameters alone do not fit, however activations do
        for layout in actor_layouts(config, arch, split.actor, per_node):
            of_parameters = tuple(value for name, value in layout.items() if name not in OF_MICRO_BATCHES)
            if of_parameters in too_large:
                continue
            laid = _with(config, actor=layout)
            plan = _planned(_with(laid, rollout=_any_engines(laid, arch, machine)), arch, machine)
            if plan is None or max(stage.resident for stage in plan.stages) > roomy.room:
                too_large.add(of_parameters)
                continue
            if any(actor_problems(plan.stages, plan.engine, roomy)):
                continue
            key = (layout["tensor_parallel"], layout["pipeline_parallel"])
            if key not in actors or apart(plan) < apart(actors[key]):
                actors[key] = plan
        best_engines: Plan | None = None
        for actor in sorted(actors.values(), key=apart):
            if best_engines is None or machine.placement == "colocated":
                best_engines = _best_engines(actor, arch, split.engines, roomy, apart)
            if best_engines is None:
                if machine.placement == "colocated":
                    continue
                break
            both = actor.config.model_copy(update={"rollout": best_engines.config.rollout})
            planned = _planned(both, arch, machine, num_gpus)
            if planned is not None and not planned.problems:
                found.append(planned)
    return [plan for plan in sorted(found, key=whole) if not _is_beaten(plan, found, whole)]


def _best_engines(
    actor: Plan, arch: Architecture, workers: int, roomy: Machine, rank: Callable[[Plan], Any]
) -> Plan | None:
    """The plan of an actor with the best engines that fit: on this many GPUs, or on the actor's own."""
    machine, utilization = actor.machine, UTILIZATION
    if machine.placement == "colocated":
        workers = actor.config.actor.world_size
        free = roomy.room - max(stage.while_sampling for stage in actor.stages)
        utilization = min(UTILIZATION, int(20 * free / machine.gpu.memory_bytes) / 20)
        if utilization <= 0:
            return None
    layouts = engine_layouts(workers, machine.assumptions.gpus_per_node, utilization)
    plans = (_planned(_with(actor.config, rollout=layout), arch, machine) for layout in layouts)
    fit = (p for p in plans if p is not None and not any(engine_problems(p.config, p.stages, p.engine, roomy)))
    return min(fit, key=rank, default=None)


def _is_beaten(plan: Plan, others: list[Plan], rank: Callable[[Plan], Any]) -> bool:
    """Whether one that uses more of the GPUs is as good: to leave some unused is worth it only if that is better."""
    return any(other.num_gpus > plan.num_gpus and rank(other) <= rank(plan) for other in others)


def _any_engines(config: RunConfig, arch: Architecture, machine: Machine) -> dict[str, Any]:
    """Engines to plan an actor with, before its own are looked for: the widest ones that its layout allows."""
    gpus = machine.assumptions.gpus_per_node
    if machine.placement == "colocated":  # an engine on the GPUs of the actor's ranks
        gpus = min(gpus, config.actor.world_size)
    tp = next(n for n in reversed(_powers(gpus)) if arch.num_heads % n == 0)
    return {"num_engines": config.teacher.engines + 1, "tensor_parallel": tp, "gpu_memory_utilization": UTILIZATION}


def _planned(config: RunConfig, arch: Architecture, machine: Machine, num_gpus: int | None = None) -> Plan | None:
    try:
        return make_plan(config, arch, machine, num_gpus=num_gpus)
    except InputError:
        return None


def distance(config: RunConfig, other: RunConfig) -> float:
    """How far one layout is from another: doublings and switches."""
    one, two = layout_of(config), layout_of(other)
    total = 0.0
    for key, value in one.items():
        if value is None or two[key] is None or isinstance(value, bool | str):
            total += value != two[key]
        else:
            total += abs(log2(value / two[key]))
    return total


def nearest(config: RunConfig, arch: Architecture, machine: Machine, num_gpus: int) -> Plan | None:
    """The layout that fits with the fewest changes; if none fits on these GPUs, on twice, four times ... as many.

    None if there is none at all: what is wrong may be something else (`fixed_problems`).
    """
    if fixed_problems(config, arch, machine):
        return None
    there_are = num_gpus
    while num_gpus <= MAX_GPUS:
        found = search(config, arch, machine, num_gpus, rank=lambda p, seconds: (distance(config, p.config), seconds))
        if num_gpus > there_are:  # one that takes all of a number that is only supposed comes first
            found.sort(key=lambda p: p.num_gpus < num_gpus)
        if found:
            return found[0]
        num_gpus *= 2
    return None
