"""A plan: what one recipe needs on one kind of GPU, what does not fit, and how long a step takes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_coreward.config.accelerator import gpu_problems
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import model_problems, setting_problems
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import GIB, Assumptions, Gpu
from megatron_coreward.planner.memory import EngineMemory, StageMemory, actor_memory, engine_memory
from megatron_coreward.planner.placement import Node, ResourceRequest, place
from megatron_coreward.planner.step_time import (
    ActorTimes,
    Phase,
    RolloutTime,
    actor_times,
    overlapped,
    rollout_time,
    sync_time,
    uncounted,
    work,
)

Placement = Literal["disaggregated", "colocated"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run is to take place."""

    gpu: Gpu
    placement: Placement
    assumptions: Assumptions
    free_bytes: int | None = None  # of a GPU, if others hold some of it now; None: all of it

    @property
    def room(self) -> int:
        """Bytes of a GPU that a run can take."""
        return self.gpu.memory_bytes if self.free_bytes is None else self.free_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a layout that the model can take; `problems` says what of it the GPUs cannot."""

    config: RunConfig
    machine: Machine
    stages: tuple[StageMemory, ...]
    engine: EngineMemory
    actor: ActorTimes
    rollout: RolloutTime
    sync: Phase
    available_gpus: int | None  # None: as many nodes as it takes

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not fit. Worked out when it is asked for: a search makes many plans that are beaten anyway."""
        return (
            *gpu_problems(self.config, self.machine.gpu.capability),
            *actor_problems(self.stages, self.engine, self.machine),
            *placement_problems(self.config, self.machine, self.available_gpus),
            *engine_problems(self.config, self.stages, self.engine, self.machine),
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """In the order of a step."""
        return (self.sync, self.rollout.phase, self.actor.scoring, self.actor.update)

    @property
    def seconds(self) -> float:
        """Of a step, in the mean."""
        return self.phase_seconds - self.overlapped

    @property
    def phase_seconds(self) -> float:
        """Of a step whose phases all follow each other."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def overlapped(self) -> float:
        """Seconds of a step in which engines and actors both work; engines and actors on the same GPUs alternate."""
        if self.machine.placement == "colocated":
            return 0.0
        return overlapped(self.config, self.rollout, self.actor)

    @property
    def notes(self) -> list[str]:
        """What makes a step shorter than predicted."""
        return uncounted(self.config)

    @property
    def num_gpus(self) -> int:
        return gpus_of(self.config, self.machine.placement)

    @property
    def tokens(self) -> float:
        """Trained on and sampled for labels, prompts left out of the latter, in a step."""
        todo = work(self.config, self.machine.assumptions)
        return todo.tokens + todo.labelled * todo.response

    @property
    def layout(self) -> dict[str, Any]:
        """The keys of a recipe that make this plan, as overrides would name them."""
        return layout_of(self.config) | {"rollout.placement": self.machine.placement}

    def to_json(self) -> dict[str, Any]:
        """Plain data; bytes and seconds."""
        a, r = self.config.actor, self.config.rollout
        return {
            "fits": not self.problems,
            "problems": list(self.problems),
            "gpu": self.machine.gpu.name,
            "gpu_bytes": self.machine.gpu.memory_bytes,
            "placement": self.machine.placement,
            "gpus": self.num_gpus,
            "layout": self.layout,
            "stages": [
                {"stage": s.stage, "peak": s.peak, "resident": s.resident, "parts": s.parts} for s in self.stages
            ],
            "engine": {
                "claimed": self.engine.claimed,
                "weights": self.engine.weights,
                "overhead": self.engine.overhead,
                "kv_cache": self.engine.cache,
                "kv_cache_tokens": self.engine.cache_tokens,
                "sequences_at_once": self.rollout.concurrent,
            },
            "step": {
                "seconds": self.seconds,
                "overlapped": self.overlapped,
                "not_counted": self.notes,
                "tokens": self.tokens,
                "tokens_per_gpu_s": self.tokens / self.seconds / self.num_gpus,
                "phases": {
                    p.name: {"seconds": p.seconds, "bound": p.bound, "seconds_by": p.seconds_by} for p in self.phases
                },
            },
            "ranks": a.world_size,
            "engine_workers": r.num_engines * r.tensor_parallel,
        }


def layout_of(config: RunConfig) -> dict[str, Any]:
    """The keys of a recipe that cut a model and its work, as overrides would name them."""
    a, r = config.actor, config.rollout
    layout: dict[str, Any] = {
        f"actor.{key}": getattr(a, key)
        for key in (
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_pipeline",
            "first_stage_layers",
            "last_stage_layers",
            "expert_parallel",
            "expert_tensor_parallel",
            "context_parallel",
            "data_parallel",
            "sequence_parallel",
            "recompute",
            "tokens_per_microbatch",
        )
    }
    for key in ("num_engines", "tensor_parallel", "max_num_seqs", "gpu_memory_utilization"):
        layout[f"rollout.{key}"] = getattr(r, key)
    return layout


def gpus_of(config: RunConfig, placement: Placement) -> int:
    """GPUs that a layout takes."""
    ranks, workers = config.actor.world_size, config.rollout.num_engines * config.rollout.tensor_parallel
    return max(ranks, workers) if placement == "colocated" else ranks + workers


def placement_problems(config: RunConfig, machine: Machine, num_gpus: int | None) -> list[str]:
    """Where no way to put ranks and engines on nodes is left, as a run would find.

    Args:
        num_gpus: there are, the last node perhaps in part; None: as many nodes as are needed.
    """
    config = placed(config, machine.placement)
    request, per_node = ResourceRequest.of_run(config), machine.assumptions.gpus_per_node
    if request.colocated and request.engines * request.engine_size > request.ranks:
        return []  # `engine_problems` says so
    if num_gpus is None:
        sizes = [per_node] * (request.ranks + request.engines)
    else:
        sizes = [min(per_node, num_gpus - first) for first in range(0, num_gpus, per_node)]
    try:
        place([Node(str(number), f"node {number}", gpus) for number, gpus in enumerate(sizes, 1)], request)
    except InputError as e:
        return [str(e)]
    return []


def placed(config: RunConfig, placement: Placement) -> RunConfig:
    """The config under the placement that a plan is made for."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"placement": placement})})


def fixed_problems(config: RunConfig, arch: Architecture, machine: Machine) -> list[str]:
    """What is wrong whatever the layout: with the one that has nothing to divide, and with the GPU."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    engines = config.teacher.engines + 1  # those of the teacher alone, and one for the policy
    actor = {
        **dict.fromkeys(("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel"), 1),
        # These say how the recipe's own stages and experts are cut, and there are none to cut here.
        **dict.fromkeys(("first_stage_layers", "last_stage_layers", "expert_tensor_parallel")),
        "context_parallel": 1,
        "data_parallel": engines if machine.placement == "colocated" else 1,
        "sequence_parallel": False,
        "tokens_per_microbatch": longest,
    }
    rollout = {"num_engines": engines, "tensor_parallel": 1, "placement": machine.placement}
    trivial = config.model_copy(
        update={
            "actor": config.actor.model_copy(update=actor),
            "rollout": config.rollout.model_copy(update=rollout),
        }
    )
    problems = [*setting_problems(trivial), *model_problems(trivial, arch)]
    return [*problems, *gpu_problems(config, machine.gpu.capability)]


def check_layout(config: RunConfig, arch: Architecture) -> None:
    """Raises InputError if the model cannot take the layout at all, one problem a line."""
    problems = [*setting_problems(config), *model_problems(config, arch)]
    if problems:
        raise InputError("\n".join(problems))


def make_plan(
    config: RunConfig,
    arch: Architecture,
    machine: Machine,
    busiest_bytes: float | None = None,
    num_gpus: int | None = None,
) -> Plan:
    """Plans a resolved config.

    Args:
        num_gpus: there are; None: as many nodes as it takes.
        busiest_bytes: that the busiest rank or worker moves in one weight sync; None: estimated.

    Raises:
        InputError: the model cannot take the layout.
    """
    check_layout(config, arch)
    gpu, assumptions = machine.gpu, machine.assumptions
    stages = actor_memory(config, arch, assumptions)
    engine = engine_memory(config, arch, gpu, assumptions)
    if busiest_bytes is None:
        # Engines pass weights on to each other, so ranks send to one engine at a time, however many there are.
        busiest_bytes = engine.weights * max(1.0, config.rollout.tensor_parallel / config.actor.world_size)
    return Plan(
        config=config,
        machine=machine,
        stages=stages,
        engine=engine,
        actor=actor_times(config, arch, gpu, assumptions),
        rollout=rollout_time(config, arch, gpu, engine, assumptions),
        sync=sync_time(busiest_bytes, config, arch, gpu, assumptions),
        available_gpus=num_gpus,
    )


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def actor_problems(stages: tuple[StageMemory, ...], engine: EngineMemory, machine: Machine) -> Iterator[str]:
    """What of the actor the GPUs cannot hold."""
    asleep = engine.asleep if machine.placement == "colocated" else 0
    room = machine.room - asleep
    worst = max(stages, key=lambda stage: stage.peak)
    if worst.peak > room:
        parts = sorted(worst.at_peak.items(), key=lambda part: -part[1])[:3]
        beside = f" beside a sleeping engine ({gib(asleep)})" if asleep else ""
        yield (
            f"actor, stage {worst.stage}: needs {gib(worst.peak)}, the GPU has {gib(room)}{beside}; "
            f"most of it: {', '.join(f'{name} {gib(size)}' for name, size in parts)}"
        )


def engine_problems(
    config: RunConfig, stages: tuple[StageMemory, ...], engine: EngineMemory, machine: Machine
) -> Iterator[str]:
    """What of the engines the GPUs cannot hold."""
    r, room = config.rollout, machine.room
    longest = config.data.max_prompt_tokens + r.max_response_tokens
    if engine.cache_tokens < longest:
        yield (
            f"engine: rollout.gpu_memory_utilization {r.gpu_memory_utilization} is {gib(engine.claimed)}, weights take "
            f"{gib(engine.weights)} and the rest {gib(engine.overhead)}; the cache must hold {longest} tokens, "
            f"it would hold {engine.cache_tokens}"
        )
    if machine.placement == "disaggregated":
        if engine.claimed > room:  # vLLM refuses to start
            yield (
                f"engine: rollout.gpu_memory_utilization {r.gpu_memory_utilization} of the GPU is "
                f"{gib(engine.claimed)}, {gib(room)} are free"
            )
        return
    kept = max(stage.while_sampling for stage in stages)
    if kept + engine.claimed > room:
        yield (
            f"colocated: while engines sample, the actor keeps {gib(kept)} and an engine takes "
            f"{gib(engine.claimed)} (rollout.gpu_memory_utilization {r.gpu_memory_utilization}); "
            f"the GPU has {gib(room)}"
        )
    ranks, workers = config.actor.world_size, r.num_engines * r.tensor_parallel
    if workers > ranks:
        yield f"colocated: {workers} engine workers for {ranks} actor ranks; allowed: as many or fewer"
