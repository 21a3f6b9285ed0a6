"""What `train --dry-run` shows: the resolved run, its memory, its processes and what it would write. Starts nothing."""

import os
import subprocess
from collections.abc import Iterator

from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import GIB, GPUS, Assumptions, Gpu
from megatron_coreward.planner.plan import Machine, make_plan
from megatron_coreward.planner.report import report
from megatron_coreward.preflight.machine import (
    checkpoint_bytes,
    joins_cluster,
    model_bytes,
    visible_gpus,
)
from megatron_coreward.preflight.memory import host_memory
from megatron_coreward.preflight.resume import newest_checkpoint
from megatron_coreward.weights.layouts import ActorLayout

_MOST_RANKS = 16  # that are shown one by one


def describe_run(config: RunConfig) -> str:
    """Everything that is known about a run before it starts; problems are reported by `preflight`."""
    try:
        arch: Architecture | None = read_architecture(config.model.hf_path)
    except InputError:
        arch = None
    parts = {
        "the resolved run": dump_config(config).splitlines(),
        "steps": _steps(config),
        "memory": _memory(config, arch),
        "processes": _processes(config),
        f"written to {config.run_dir}": [f"{name:<15} {what}" for name, what in written_files(config, arch).items()],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}".rstrip() for line in lines)]) for title, lines in parts.items())


def _steps(config: RunConfig) -> Iterator[str]:
    done = newest_checkpoint(config.run_dir)
    yield f"{config.steps} in all, {f'resumed after step {done}' if done else 'from the first one on'}"
    needs = needs_of(config.method)
    in_views = f", in {len(needs.views)} views" if len(needs.views) > 1 else ""
    teacher = f", and {config.teacher.n} of the teacher" if needs.teacher else ""
    trained = "" if config.rollout.votes is None else f", {config.rollout.n} of them trained on"
    samples = config.rollout.num_samples
    yield f"{config.data.batch_size} questions in a step{in_views}, {samples} completions each{trained}{teacher}"


def _memory(config: RunConfig, arch: Architecture | None) -> Iterator[str]:
    """The plan for this machine's GPUs, if the planner knows them; lower bounds on a machine without."""
    gpu = _known_gpu() if visible_gpus() else None
    if arch is None:
        yield "not known: model.hf_path cannot be read"
    elif gpu is not None:
        try:
            plan = make_plan(config, arch, Machine(gpu, config.rollout.placement, Assumptions()))
        except InputError as error:
            yield f"no plan: {error}"
            return
        yield from report(plan, config.model.hf_path.name).splitlines()
    elif visible_gpus() or joins_cluster():
        yield f"`megatron-coreward plan` estimates it for {', '.join(GPUS)}"
    else:
        parts = host_memory(config, arch)
        yield from (f"{name:<40} {_size(size):>12}" for name, size in parts.items())
        yield f"{'all, at least':<40} {_size(sum(parts.values())):>12}"


def _known_gpu() -> Gpu | None:
    """The kind of this machine's GPUs, if the planner has it."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.lower()
    except (OSError, subprocess.SubprocessError):
        return None
    return next((gpu for name, gpu in GPUS.items() if name in listed), None)


def _processes(config: RunConfig) -> Iterator[str]:
    a, r = config.actor, config.rollout
    cluster, workers = os.environ.get("RAY_ADDRESS"), r.num_engines * r.tensor_parallel
    yield "driver: on this machine"
    shared = ", on the GPUs of the actor ranks" if r.placement == "colocated" else ""
    yield (
        f"actor: {a.world_size} ranks (TP {a.tensor_parallel}, CP {a.context_parallel}, DP {a.data_parallel}, "
        f"PP {a.pipeline_parallel}, EP {a.expert_parallel})"
    )
    yield f"rollout engines: {r.num_engines} of {r.tensor_parallel} ranks each{shared}"
    if cluster:
        yield f"ranks: on the nodes of the Ray cluster at {cluster}, with a GPU each if the nodes have GPUs;"
        yield "  an engine is on one node, and so is a tensor-parallel group of the actor if a node has room for it"
    elif visible_gpus():
        yield "ranks: on this machine, with a GPU each"
    else:
        yield f"ranks: on this machine's CPUs, with {a.cpu_threads} (actor) and {r.cpu_threads} (engine) threads each"
    layout = ActorLayout(
        tensor_parallel=a.tensor_parallel,
        pipeline_parallel=a.pipeline_parallel,
        context_parallel=a.context_parallel,
        data_parallel=a.data_parallel,
    )
    for rank in range(min(a.world_size, _MOST_RANKS)):
        at = layout.place(rank)
        engine = f", on the GPU of engine {rank // r.tensor_parallel}" if shared and rank < workers else ""
        yield f"  actor rank {rank}: stage {at.pp}, replica {at.dp}, context {at.cp}, tensor shard {at.tp}{engine}"
    if a.world_size > _MOST_RANKS:
        yield f"  ... and {a.world_size - _MOST_RANKS} further actor ranks"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 2 else f"{num_bytes / 2**20:.1f} MiB"


def written_files(config: RunConfig, arch: Architecture | None) -> dict[str, str]:
    """What a run writes into its directory, by name."""
    c = config.checkpoint
    size = "" if arch is None else f", {_size(checkpoint_bytes(config, arch))} each at least"
    when = f"every {c.every} steps and at the end" if c.every else "at the end"
    best = f", and the best one by {c.best_metric}" if c.best_metric else ""
    files = {
        "config.yaml": "the resolved run, as above",
        "metrics.jsonl": "a line per step",
        "events.log": "what happened beside the steps",
        "labels.jsonl": "the labels of every question from epoch to epoch",
        **({"anchors.jsonl": "the answers to the anchor questions"} if config.guard.anchors else {}),
        "timeline.jsonl": "who was busy when: actors, driver and every engine",
        "logs/": "what the processes print",
        "tensorboard/": "the metrics, for TensorBoard",
        "checkpoints/": f"{when}; the newest {c.keep} are kept{best}{size}",
        "rollouts/": "the rollouts of every step" if config.telemetry.dump_rollouts else "rollouts since a checkpoint",
        "hf/": f"the final model{'' if arch is None else f', {_size(model_bytes(config, arch))}'}",
        "report.html": "the run as a page",
        "missed.json": "the first step that a tracker lacks, while one does",
        "lock": "of the process that trains",
    }
    if config.guard.action != "off" and config.guard.anchors:
        files["anchors.jsonl"] = "the answers to the anchor questions"
    if config.guard.action == "rollback":
        files["rollbacks.jsonl"] = "when the guard went back, and why"
    if config.telemetry.wandb_project is not None:
        files["wandb/"] = files["wandb_id"] = f"of the project {config.telemetry.wandb_project} in Weights & Biases"
    if config.telemetry.mlflow_experiment is not None:
        files["mlflow_run_id"] = f"of the experiment {config.telemetry.mlflow_experiment} in MLflow"
    return files
