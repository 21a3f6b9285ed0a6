"""A plan as text: the memory of every stage, an engine's, and the phases of a step."""

from collections.abc import Iterator, Sequence

from megatron_coreward.config.methods import method_title
from megatron_coreward.planner.hardware import GIB
from megatron_coreward.planner.memory import StageMemory
from megatron_coreward.planner.plan import Plan, gib

MOST_STAGES = 4


def report(plan: Plan, model: str) -> str:
    """Everything about one plan except whether it fits."""
    return "\n".join([*_head(plan, model), "", *_memory(plan), "", *_step(plan)])


def _head(plan: Plan, model: str) -> Iterator[str]:
    c, machine = plan.config, plan.machine
    a, r = c.actor, c.rollout
    beside = "beside" if machine.placement == "colocated" else "and"
    gpu = f"{machine.gpu.name} ({gib(machine.gpu.memory_bytes)})"
    yield f"{model}, {method_title(c.method)}, {c.model.dtype}, on {plan.num_gpus} x {gpu}"
    yield (
        f"{machine.placement}: {a.world_size} actor ranks (TP {a.tensor_parallel}, PP {a.pipeline_parallel}, VPP "
        f"{a.virtual_pipeline}, CP {a.context_parallel}, EP {a.expert_parallel}, DP {a.data_parallel}; recompute "
        f"{a.recompute}, {a.tokens_per_microbatch} tokens a micro-batch)"
    )
    yield f"{beside} {r.num_engines} engines of TP {r.tensor_parallel}, {r.max_num_seqs} sequences at once"


def shown(stages: Sequence[StageMemory]) -> list[StageMemory]:
    """The stages that differ: first, last, and the fullest between them, if there are many."""
    if len(stages) <= MOST_STAGES:
        return list(stages)
    between = max(stages[1:-1], key=lambda stage: stage.peak)
    return [stages[0], between, stages[-1]]


def _memory(plan: Plan) -> Iterator[str]:
    stages = shown(plan.stages)
    yield f"{'GiB a GPU of the actor':<24}" + "".join(f"{f'stage {s.stage}':>10}" for s in stages)
    for part in stages[0].parts:
        if any(s.parts[part] for s in stages):
            note = "  (not beside activations and scoring)" if part in ("step", "checkpoint") else ""
            yield f"  {part:<22}" + "".join(f"{s.parts[part] / GIB:>10.2f}" for s in stages) + note
    yield f"  {'peak':<22}" + "".join(f"{s.peak / GIB:>10.2f}" for s in stages)
    e = plan.engine
    yield "GiB a GPU of an engine"
    for name, size in (("weights", e.weights), ("activations, graphs", e.overhead), ("key-value cache", e.cache)):
        yield f"  {name:<22}{size / GIB:>10.2f}"
    yield f"  the cache holds {e.cache_tokens:,} tokens; {plan.rollout.concurrent} sequences decode at once"


def _step(plan: Plan) -> Iterator[str]:
    yield f"{'seconds of a step':<24}{'':>10}  bound by"
    for phase in plan.phases:
        if phase.seconds:
            yield f"  {phase.name:<22}{phase.seconds:>10.1f}  {phase.bound} {phase.seconds_by[phase.bound]:.1f}"
    if plan.overlapped:
        ahead = "engines draw for the next step while actors learn (rollout.max_staleness)"
        yield f"  {'overlapped':<22}{-plan.overlapped:>10.1f}  {ahead}"
    rate = plan.tokens / plan.seconds / plan.num_gpus
    yield f"  {'all':<22}{plan.seconds:>10.1f}  {plan.tokens / 1e6:.2f} M tokens, {rate:,.0f} tokens/s a GPU"
    yield from _notes(plan)


def _notes(plan: Plan) -> Iterator[str]:
    return (f"  not counted: {note}" for note in plan.notes)


def overrides(plan: Plan) -> str:
    """The layout as `key=value` arguments of any command that reads a recipe."""
    words = {True: "true", False: "false", None: "null"}
    values = (
        (key, words[value] if value is None or isinstance(value, bool) else value) for key, value in plan.layout.items()
    )
    return " ".join(f"{key}={value}" for key, value in values)


def ranking(plans: Sequence[Plan]) -> str:
    """A row a plan, best first; of at least one."""
    titles = ("s/step", "GPUs", "actor", "TP", "PP", "VPP", "EP", "DP", "engines", "GiB")
    lines = [f"{_row(*titles)}  overrides"]
    for plan in plans:
        a, r = plan.config.actor, plan.config.rollout
        layout = (a.tensor_parallel, a.pipeline_parallel, a.virtual_pipeline, a.expert_parallel, a.data_parallel)
        engines, peak = f"{r.num_engines} x TP{r.tensor_parallel}", max(stage.peak for stage in plan.stages) / GIB
        row = _row(f"{plan.seconds:.1f}", plan.num_gpus, a.world_size, *layout, engines, f"{peak:.0f}")
        lines.append(f"{row}  {overrides(plan)}")
    return "\n".join([*lines, *_notes(plans[0])])


def _row(*cells: object) -> str:
    return " ".join(str(cell).rjust(width) for cell, width in zip(cells, (8, 5, 6, 3, 3, 3, 3, 4, 9, 4), strict=True))
