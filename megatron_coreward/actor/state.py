"""The actor's training state as a Megatron distributed checkpoint, readable under any layout.

Policy weights, optimizer moments and main parameters, schedule position, teacher value and compensation. No random
state: nothing that an actor does draws from a generator (no dropout; rollout seeds are functions of seed and step). The
frozen reference is the model that the run started from and is read from there.

Saving gathers the optimizer's and the teacher's shards over data-parallel ranks, so that another layout can read them:
for the length of the call that costs 16 bytes per parameter of a model-parallel rank in host memory.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coreward.actor.teacher import EmaTeacher, FlatWeights

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def _model_state(policy: list[DistributedDataParallel]) -> dict[str, Any]:
    several = len(policy) > 1
    return {f"model{i}" if several else "model": c.module.sharded_state_dict() for i, c in enumerate(policy)}


def _teacher_state(policy: list[DistributedDataParallel], weights: FlatWeights, prefix: str) -> dict[str, Any]:
    """The policy's sharded state with other values under prefixed keys."""
    state = {}
    for chunk, (name, sharded) in zip(policy, _model_state(policy).items(), strict=True):
        params = dict(chunk.module.named_parameters())
        state[name] = {
            key: dataclasses.replace(entry, key=prefix + entry.key, data=weights.of(params[key]), **_fp32(entry))
            for key, entry in sharded.items()
            if key in params
        }
    return state


def _fp32(entry: Any) -> dict[str, Any]:
    return {"dtype": torch.float32} if hasattr(entry, "dtype") else {}


def _sharded_state(
    policy: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    teacher: tuple[FlatWeights, FlatWeights] | None,
    is_loading: bool,
) -> dict[str, Any]:
    state = _model_state(policy)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=RESHARDABLE)
    if teacher is not None:
        state["teacher_value"] = _teacher_state(policy, teacher[0], "teacher.value.")
        state["teacher_compensation"] = _teacher_state(policy, teacher[1], "teacher.compensation.")
    return state


def save_state(
    policy: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    teacher: EmaTeacher | None,
    target: Path,
) -> None:
    """Writes the state of all ranks into the directory `target`, which exists and is empty. Called on every rank."""
    whole = None if teacher is None else teacher.whole(policy)
    state = _sharded_state(policy, optimizer, whole, is_loading=False)
    state["scheduler"] = scheduler.state_dict()
    dist_checkpointing.save(state, str(target))


def load_state(
    policy: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    teacher: EmaTeacher | None,
    source: Path,
) -> None:
    """Reads what `save_state` wrote, under whatever layout this is. Called on every rank."""
    whole = None
    if teacher is not None:
        whole = FlatWeights(policy, torch.float32), FlatWeights(policy, torch.float32)
    state = dist_checkpointing.load(_sharded_state(policy, optimizer, whole, is_loading=True), str(source))
    for i, chunk in enumerate(policy):
        chunk.module.load_state_dict(state[f"model{i}" if len(policy) > 1 else "model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if teacher is not None and whole is not None:
        for weights, key in zip(whole, ("teacher_value", "teacher_compensation"), strict=True):
            for chunk, tensors in zip(policy, state[key].values(), strict=True):
                params = dict(chunk.module.named_parameters())
                for name, tensor in tensors.items():
                    weights.of(params[name]).copy_(tensor)
        teacher.take(*whole)
