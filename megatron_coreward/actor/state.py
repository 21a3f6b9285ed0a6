"""The actor's training state as a Megatron distributed checkpoint, readable under any layout.

Policy weights, the optimizer's main parameters and moments, the teacher's value and compensation, the schedule's
position. No random state: nothing that an actor does draws from a generator (no dropout; rollout seeds are functions of
seed and step). The frozen reference is the model that the run started from and is read from there.

Everything that belongs to a parameter is saved in the parameter's own shape, as the model's weights are, so that any
tensor, pipeline or data-parallel layout can read it. (Megatron's own resharding of optimizer state does not know
torch's AdamW: in 0.16 it fails on the step count.) To be saved, one quantity after the other is gathered over
data-parallel ranks, which takes 4 bytes of device memory per parameter of a model-parallel rank. Each data-parallel
replica then writes other parameters, so that its host holds 12 bytes (20 with a teacher) per parameter of a
model-parallel rank, divided by the replicas, until they are written.

Invariants (tests/actor/test_state.py, tests/actor/test_saving.py):
  1. What was saved under one layout is read under any other, to the bit.
  2. The replicas of a shard write about equally much, and every shard once.
  3. Beside the state itself, resuming takes host memory for one piece of a tensor.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_coreward.actor.hf_weights import ShardReader, global_parameters, load_megatron
from megatron_coreward.actor.optimizer import MOMENTS, optimizer_parts, set_step_count, step_count
from megatron_coreward.actor.parallel import ParallelRanks
from megatron_coreward.actor.saving import Saving
from megatron_coreward.actor.shards import FlatWeights, MainShard, main_shards
from megatron_coreward.actor.teacher import EmaTeacher
from megatron_coreward.checkpoint.safe_load import check_no_code, read_common_state
from megatron_coreward.checkpoint.torch_dist import MegatronWeights
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.mapping import is_expert

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


class _Writers:
    """Which of the replicas of a shard writes it: the one with the fewest bytes so far. All replicas ask in the same
    order and get the same answers, so every shard is written once, and every replica writes about as much."""

    def __init__(self) -> None:
        dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        self._bytes = {False: [0] * dense, True: [0] * parallel_state.get_expert_data_parallel_world_size()}

    def assign(self, name: str, entry: Any) -> Any:
        """The entry with the replicas of its parameter renumbered: Megatron lets number 0 write."""
        loads = self._bytes[is_expert(name)]
        writer = min(range(len(loads)), key=loads.__getitem__)
        loads[writer] += entry.data.nbytes
        *others, replica = entry.replica_id
        return dataclasses.replace(entry, replica_id=(*others, (replica - writer) % len(loads)))


class HostMemory:
    """Host memory in which quantities wait to be written. Of a GPU's it is page-locked and kept for the next
    checkpoint: to lock pages takes longer than to fill them. Elsewhere a copy of its own, freed when it is written."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, key: str, values: torch.Tensor) -> torch.Tensor:
        """The values, once the device is synchronised."""
        if not values.is_cuda:
            return values.clone()
        kept = self._kept.get(key)
        if kept is None or kept.shape != values.shape:
            kept = self._kept[key] = torch.empty_like(values, device="cpu", pin_memory=True)
        return kept.copy_(values, non_blocking=True)


def _weights_to_write(policy: Policy, writers: _Writers, host: HostMemory) -> dict[str, Any]:
    """The weights of every chunk, spread over their replicas. What Transformer Engine's layers keep for FP8 scaling
    stays out: it is a pickle, and all of it follows from the next micro-batches (`MegatronActor.update` warms up the
    one recipe with a memory). Weights in FP8 are written as numbers of the model's dtype."""
    several = len(policy) > 1
    state = {}
    for i, chunk in enumerate(policy):
        for module in chunk.module.modules():
            if hasattr(module, "_split_extra_state"):  # of grouped experts, for the entries that are left out below
                # With Transformer Engine 2.18 they are empty for most recipes, and Megatron 0.16 fails to split them.
                module._split_extra_state = lambda state, copies=module.num_gemms: [state] * copies
        params = dict(chunk.module.named_parameters())
        weights = {k: v for k, v in chunk.module.sharded_state_dict().items() if k in params}
        for key, entry in weights.items():
            entry = writers.assign(key, entry)
            if is_float8tensor(entry.data):
                if is_main_replica(entry.replica_id):  # one at a time on the device, all of them on the host
                    data = host.copy(f"weights.{i}.{key}", dequantize_fp8_tensor(entry.data))
                else:
                    data = _nothing_like(entry.data)
                entry = dataclasses.replace(entry, data=data)
            weights[key] = entry
        state[f"model{i}" if several else "model"] = weights
    return state


def _quantity_to_write(
    policy: Policy, quantity: str, whole: FlatWeights, writers: _Writers, host: HostMemory
) -> dict[str, Any]:
    """One quantity in the parameters' shapes, under prefixed keys: values on the host, and for the shards that another
    rank writes, their shape alone."""
    state: dict[str, Any] = {}
    for number, chunk in enumerate(policy):
        params = dict(chunk.module.named_parameters())
        entries = chunk.module.sharded_state_dict()
        state[f"{quantity}{number}"] = written = {}
        for name, param in params.items():
            values = whole.of(param)
            entry = writers.assign(name, dataclasses.replace(entries[name], data=values, **_fp32(entries[name])))
            mine = is_main_replica(entry.replica_id)
            data = host.copy(f"{quantity}.{number}.{name}", values) if mine else _nothing_like(values)
            written[name] = dataclasses.replace(entry, key=f"{quantity}.{entry.key}", data=data)
    return state


def _fp32(entry: Any) -> dict[str, Any]:
    return {"dtype": torch.float32} if hasattr(entry, "dtype") else {}


def _nothing_like(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=values.dtype).expand(values.shape)


def begin_save(
    policy: Policy,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    teacher: EmaTeacher | None,
    target: Path,
    host: HostMemory,
) -> Saving:
    """Begins to write the state of all ranks into the directory `target`, which exists and is empty. Called on every
    rank; training may go on at once."""
    writers = _Writers()
    state: dict[str, Any] = _weights_to_write(policy, writers, host)
    for name, slots in _quantities(optimizer, teacher).items():
        whole = FlatWeights(policy, torch.float32)
        whole.fill(slots())
        state |= _quantity_to_write(policy, name, whole, writers, host)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are complete
        del whole  # the next quantity takes its memory
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
    arch: Architecture,
    ranks: ParallelRanks,
) -> None:
    """Reads what `begin_save` wrote, under whatever layout this is. Called on every rank.

    A rank reads its own shards, one after the other, straight to where they belong: of the weights all that it holds,
    of everything else what its share of the optimizer owns.
    """
    check_no_code(source)
    chunks = [chunk.module for chunk in policy]
    load_megatron(chunks, arch, ranks, source)
    names = {param: name for name, param in global_parameters(chunks, arch, ranks)}
    for quantity, slots in _quantities(optimizer, teacher).items():
        with closing(MegatronWeights(source, arch, f"{quantity}.")) as weights:
            reader = ShardReader(arch, ranks, weights)
            for shard, own in slots():
                reader.read(names[shard.param], shard.param.shape, shard.start, own)
    if policy[0].module.config.fp8_param:  # FP8 weights from the main parameters, as after a step
        for part in optimizer_parts(optimizer):
            part._copy_main_params_to_model_params()
        for chunk in policy:
            chunk.start_param_sync(force_sync=True)
    common = read_common_state(source)
    scheduler.num_steps = 0  # Megatron adds what it reads
    scheduler.load_state_dict(common["scheduler"])
    set_step_count(optimizer, common["optimizer_steps"])
