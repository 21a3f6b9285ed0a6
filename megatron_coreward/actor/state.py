"""The actor's training state as a Megatron distributed checkpoint, readable under any layout.

Policy weights, the optimizer's main parameters and moments, the teacher's value and compensation, the schedule's
position. No random state: nothing that an actor does draws from a generator (no dropout; rollout seeds are functions of
seed and step). The frozen reference is the model that the run started from and is read from there.

Everything that belongs to a parameter is saved in the parameter's own shape, as the model's weights are, so that any
tensor, pipeline or data-parallel layout can read it. (Megatron's own resharding of optimizer state does not know
torch's AdamW: in 0.16 it fails on the step count.) While it is saved, the shards gathered over data-parallel ranks take
12 bytes (20 with a teacher) per parameter of a model-parallel rank.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coreward.actor.optimizer import MOMENTS, set_step_count, step_count
from megatron_coreward.actor.saving import Saving
from megatron_coreward.actor.shards import FlatWeights, MainShard, main_shards
from megatron_coreward.actor.teacher import EmaTeacher
from megatron_coreward.checkpoint.safe_load import check_no_code

Policy = list[DistributedDataParallel]
Slots = Iterator[tuple[MainShard, torch.Tensor]]  # a shard with one of its quantities, to be read or written in place


def _quantities(optimizer: MegatronOptimizer, teacher: EmaTeacher | None) -> dict[str, Callable[[], Slots]]:
    """Everything that is cut like the main parameters, by the name under which it is saved."""

    def moment(name: str) -> Callable[[], Slots]:
        return lambda: ((shard, shard.state[name]) for shard in main_shards(optimizer))

    found: dict[str, Callable[[], Slots]] = {"main": lambda: ((s, s.value) for s in main_shards(optimizer))}
    found |= {name: moment(name) for name in MOMENTS}
    if teacher is not None:
        found["teacher"] = lambda: zip(main_shards(optimizer), teacher.values, strict=True)
        found["teacher_compensation"] = lambda: zip(main_shards(optimizer), teacher.compensations, strict=True)
    return found


def _model_state(policy: Policy) -> dict[str, Any]:
    several = len(policy) > 1
    return {f"model{i}" if several else "model": c.module.sharded_state_dict() for i, c in enumerate(policy)}


def _quantity_state(policy: Policy, weights: FlatWeights, prefix: str) -> dict[str, Any]:
    """The policy's sharded state with other values, in fp32, under prefixed keys."""
    state = {}
    for chunk, (name, sharded) in zip(policy, _model_state(policy).items(), strict=True):
        params = dict(chunk.module.named_parameters())
        state[name] = {
            key: dataclasses.replace(entry, key=f"{prefix}.{entry.key}", data=weights.of(params[key]), **_fp32(entry))
            for key, entry in sharded.items()
            if key in params
        }
    return state


def _fp32(entry: Any) -> dict[str, Any]:
    return {"dtype": torch.float32} if hasattr(entry, "dtype") else {}


def begin_save(
    policy: Policy,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    teacher: EmaTeacher | None,
    target: Path,
) -> Saving:
    """Begins to write the state of all ranks into the directory `target`, which exists and is empty. Called on every
    rank; training may go on at once."""
    state = _model_state(policy)
    for name, slots in _quantities(optimizer, teacher).items():
        whole = FlatWeights(policy, torch.float32)
        whole.fill(slots())
        state[name] = _quantity_state(policy, whole, name)
    state["scheduler"] = scheduler.state_dict()
    state["optimizer_steps"] = step_count(optimizer)
    live = [tensor for chunk in policy for tensor in (*chunk.parameters(), *chunk.module.buffers())]
    return Saving(state, live, target)


@torch.no_grad()
def load_state(
    policy: Policy,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    teacher: EmaTeacher | None,
    source: Path,
) -> None:
    """Reads what `begin_save` wrote, under whatever layout this is. Called on every rank."""
    check_no_code(source)
    wholes = {name: FlatWeights(policy, torch.float32) for name in _quantities(optimizer, teacher)}
    wanted = _model_state(policy)
    wanted |= {name: _quantity_state(policy, whole, name) for name, whole in wholes.items()}
    state = dist_checkpointing.load(wanted, str(source))
    for chunk, name in zip(policy, _model_state(policy), strict=True):
        chunk.module.load_state_dict(state[name])
    for quantity, slots in _quantities(optimizer, teacher).items():
        for chunk, tensors in zip(policy, state[quantity].values(), strict=True):
            params = dict(chunk.module.named_parameters())
            for name, tensor in tensors.items():
                wholes[quantity].of(params[name]).copy_(tensor)
        for shard, own in slots():
            own.copy_(wholes[quantity].own(shard))
    scheduler.load_state_dict(state["scheduler"])
    set_step_count(optimizer, state["optimizer_steps"])
