"""The actor's training state as a Megatron distributed checkpoint, readable under any layout.

Policy weights, the optimizer's main parameters and moments, the teacher's value and compensation, the schedule's
position. No random state: nothing that an actor does draws from a generator (no dropout; rollout seeds are functions of
seed and step). The frozen reference is the model that the run started from and is read from there.

Everything that belongs to a parameter is saved in the parameter's own shape, as the model's weights are, so that any
tensor, pipeline or data-parallel layout can read it. (Megatron's own resharding of optimizer state does not know
torch's AdamW: in 0.16 it fails on the step count.) To be saved, one quantity after the other is gathered over
data-parallel ranks, which takes 4 bytes of device memory per parameter of a model-parallel rank. The hosts of the ranks
that write hold all of them, 12 bytes (20 with a teacher), until they are written.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coreward.actor.optimizer import MOMENTS, optimizer_parts, set_step_count, step_count
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
    """The weights of every chunk. What Transformer Engine's layers keep for FP8 scaling stays out: it is a pickle, and
    all of it follows from the next micro-batches (`MegatronActor.update` warms up the one recipe with a memory)."""
    several = len(policy) > 1
    state = {}
    for i, chunk in enumerate(policy):
        for module in chunk.module.modules():
            if hasattr(module, "_split_extra_state"):  # of grouped experts, for the entries that are left out below
                # With Transformer Engine 2.18 they are empty for most recipes, and Megatron 0.16 fails to split them.
                module._split_extra_state = lambda state, copies=module.num_gemms: [state] * copies
        weights = {k: v for k, v in chunk.module.sharded_state_dict().items() if not _is_scaling_state(k)}
        for entry in weights.values():
            if hasattr(entry, "data") and entry.data is not None and is_float8tensor(entry.data):
                entry.data = dequantize_fp8_tensor(entry.data)
        state[f"model{i}" if several else "model"] = weights
    return state


def _is_scaling_state(key: str) -> bool:
    return key.rpartition(".")[2].startswith("_extra_state")


def _quantity_state(policy: Policy, prefix: str, values: Callable[[Any, torch.nn.Parameter], Any]) -> dict[str, Any]:
    """The policy's sharded state with other values, in fp32, under prefixed keys.

    Args:
        values: those that an entry of the state shall have in place of its parameter's.
    """
    state = {}
    for chunk, (name, sharded) in zip(policy, _model_state(policy).items(), strict=True):
        params = dict(chunk.module.named_parameters())
        state[name] = {
            key: dataclasses.replace(
                entry, key=f"{prefix}.{entry.key}", data=values(entry, params[key]), **_fp32(entry)
            )
            for key, entry in sharded.items()
            if key in params
        }
    return state


def _fp32(entry: Any) -> dict[str, Any]:
    return {"dtype": torch.float32} if hasattr(entry, "dtype") else {}


def _to_write(weights: FlatWeights, entry: Any, param: torch.nn.Parameter) -> torch.Tensor:
    """The values on the host, or, if another rank writes them, their shape alone."""
    values = weights.of(param)
    if is_main_replica(entry.replica_id):
        return values.cpu()
    return torch.zeros((), dtype=values.dtype).expand(values.shape)


def _to_read(weights: FlatWeights, entry: Any, param: torch.nn.Parameter) -> torch.Tensor:
    return weights.of(param)


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
        state[name] = _quantity_state(policy, name, partial(_to_write, whole))
    state["scheduler"] = scheduler.state_dict()
    state["optimizer_steps"] = step_count(optimizer)
    live = [tensor for chunk in policy for tensor in (*chunk.parameters(), *chunk.module.buffers())]
    return Saving(state, [tensor for tensor in live if not is_float8tensor(tensor)], target)


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
    wholes = {name: FlatWeights(policy, torch.float32, "cpu") for name in _quantities(optimizer, teacher)}
    wanted = _model_state(policy)
    wanted |= {name: _quantity_state(policy, name, partial(_to_read, whole)) for name, whole in wholes.items()}
    state = dist_checkpointing.load(wanted, str(source))
    for chunk, name in zip(policy, _model_state(policy), strict=True):
        missing, unknown = chunk.module.load_state_dict(state[name], strict=False)
        if unknown or any(not _is_scaling_state(key) for key in missing):
            raise RuntimeError(f"{source}: the model's state lacks {missing} and has {unknown} beyond it")
    for quantity, slots in _quantities(optimizer, teacher).items():
        for chunk, tensors in zip(policy, state[quantity].values(), strict=True):
            params = dict(chunk.module.named_parameters())
            for name, tensor in tensors.items():
                wholes[quantity].of(params[name]).copy_(tensor)
        for shard, own in slots():
            own.copy_(wholes[quantity].own(shard))
    if policy[0].module.config.fp8_param:  # FP8 weights from the main parameters, as after a step
        for part in optimizer_parts(optimizer):
            part._copy_main_params_to_model_params()
        for chunk in policy:
            chunk.start_param_sync(force_sync=True)
    scheduler.num_steps = 0  # Megatron adds what it reads
    scheduler.load_state_dict(state["scheduler"])
    set_step_count(optimizer, state["optimizer_steps"])
