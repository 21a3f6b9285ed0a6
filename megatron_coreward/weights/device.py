"""Weights from GPU to GPU: every actor rank holds a full bucket at a time, and engines take it from there.

  ipc   an engine worker on the same GPU maps the rank's memory (CUDA IPC) and reads its shards out of it.
  nccl  rank 0 broadcasts the bucket to the workers of all engines.

A full bucket comes about without a gather: each rank writes the blocks that it hands out into zeros, and the ranks add
their memories up as 32-bit integers. One rank alone has bits at any place, so the sum is these bits.

Invariants (tests/weights/test_device.py):
  1. On every rank a bucket holds, bit by bit, the tensors that the ranks' blocks make.
  2. A rank holds two buckets, however many sets of weights it publishes, and never more of the model.
  3. Behind a bucket stand its version and number; they are written when the bucket is complete.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_coreward.weights.buckets import Entry, TensorMeta, block_bounds, plan_buckets
from megatron_coreward.weights.ports import free_port
from megatron_coreward.weights.send import BlockHash, LocalBlock, crc32

MARK_BYTES = 16  # version and bucket, two 64-bit integers
NUM_SLOTS = 2  # engines load one bucket while the next is filled


def tensor_in(memory: torch.Tensor, entry: Entry) -> torch.Tensor:
    """The tensor of an entry, as a view of a bucket's bytes."""
    span = memory[entry.offset : entry.offset + entry.meta.nbytes]
    return span.view(getattr(torch, entry.meta.dtype)).view(entry.meta.shape)


def read_mark(memory: torch.Tensor, nbytes: int) -> tuple[int, int]:
    """Version and number of the bucket of `nbytes` that memory holds."""
    version, bucket = memory[nbytes : nbytes + MARK_BYTES].view(torch.int64).tolist()
    return version, bucket


class Staging:
    """Two slots of device memory through which all buckets of a process pass."""

    def __init__(self, slot_bytes: int, device: torch.device) -> None:
        """`slot_bytes`: of the largest bucket, without its mark."""
        self.slot_bytes = slot_bytes + MARK_BYTES
        self.memory = torch.zeros(NUM_SLOTS * self.slot_bytes, dtype=torch.uint8, device=device)

    def slot(self, bucket: int) -> torch.Tensor:
        """The slot of a bucket, with room for its mark."""
        start = bucket % NUM_SLOTS * self.slot_bytes
        return self.memory[start : start + self.slot_bytes]


def largest_bucket(metas: Sequence[TensorMeta], bucket_bytes: int) -> int:
    return max(bucket.nbytes for bucket in plan_buckets(metas, bucket_bytes))


class DeviceSender:
    """One rank's end of a transfer: what IPC and NCCL have in common (`weights.send.Sender`)."""

    def __init__(
        self,
        blocks: Sequence[LocalBlock],
        metas: Sequence[TensorMeta],
        bucket_bytes: int,
        rank: int,
        num_ranks: int,
        staging: Staging,
    ) -> None:
        """Args:
            blocks: what this rank hands out; over all ranks they tile every tensor exactly once.
            metas: all tensors, in the order in which they travel; the same on every rank.

        Raises:
            ValueError: a block of an unknown tensor, or one that does not fit the tensor's shape.
        """
        self.metas, self.buckets = tuple(metas), plan_buckets(metas, bucket_bytes)
        self._blocks: dict[str, list[LocalBlock]] = {meta.name: [] for meta in metas}
        shapes = {meta.name: meta.shape for meta in metas}
        for block in blocks:
            if block.name not in self._blocks:
                raise ValueError(f"this rank holds a block of {block.name!r}, which is not among the tensors to send")
            block_bounds(block.name, shapes[block.name], block.index)
            self._blocks[block.name].append(block)
        self._bucket_bytes, self._rank, self._num_ranks, self._staging = bucket_bytes, rank, num_ranks, staging

    @property
    def init_info(self) -> dict[str, Any]:
        return {"tensors": [[m.name, list(m.shape), m.dtype] for m in self.metas], "bucket_bytes": self._bucket_bytes}

    @torch.no_grad()
    def fill(self, bucket_index: int, version: int) -> torch.Tensor:
        """Completes a bucket in its slot, together with all ranks. Returns its bytes with the mark behind them.

        Raises:
            ValueError: what a block's `read` returned does not have the shape of the block, or is no float tensor.
        """
        bucket = self.buckets[bucket_index]
        memory = self._staging.slot(bucket_index)[: bucket.nbytes + MARK_BYTES]
        content = memory[: bucket.nbytes]
        memory.zero_()
        for entry in bucket.entries:
            tensor = tensor_in(memory, entry)
            for block in self._blocks[entry.meta.name]:
                target, value = tensor[block.index], block.read()
                if value.shape != target.shape or not value.is_floating_point():
                    raise ValueError(
                        f"block {block.index} of {block.name!r}: read {value.dtype} {tuple(value.shape)}, "
                        f"expected a float tensor {tuple(target.shape)}"
                    )
                target.copy_(value)
        if self._num_ranks > 1:
            dist.all_reduce(content.view(torch.int32))
        memory[bucket.nbytes :].view(torch.int64).copy_(torch.tensor([version, bucket_index]))
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        return memory

    def write(self, bucket_index: int, version: int, hashes: bool = False) -> list[BlockHash]:
        """Sends a bucket; returns checksums of this rank's blocks, if asked for them."""
        memory = self.fill(bucket_index, version)
        written = []
        for entry in self.buckets[bucket_index].entries if hashes else ():
            for block in self._blocks[entry.meta.name]:
                bounds = block_bounds(block.name, entry.meta.shape, block.index)
                part = block.read().to(getattr(torch, entry.meta.dtype))
                written.append(BlockHash(block.name, bounds, crc32(part.cpu())))
        self._send(memory)
        return written

    def _send(self, memory: torch.Tensor) -> None:
        """Brings a bucket on its way; where engines come for it, there is nothing to do."""

    def close(self) -> None:
        """Lets go of everything. May be repeated."""


class IpcSender(DeviceSender):
    """Engines on the ranks' own GPUs map the slots once and read each bucket when they are told to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        handles: list[Any] = [export_memory(self._staging.memory)]
        if self._num_ranks > 1:
            own, handles = handles[0], [None] * self._num_ranks
            dist.all_gather_object(handles, own)
        self._handles = dict(handles)

    @property
    def init_info(self) -> dict[str, Any]:
        return super().init_info | {"handles": self._handles, "slot_bytes": self._staging.slot_bytes}


class NcclSender(DeviceSender):
    """Rank 0 broadcasts; the other ranks complete the buckets with it."""

    def __init__(self, *args: Any, address: str, num_workers: int) -> None:
        """Args:
        address: of rank 0's host.
        num_workers: of all engines together.
        """
        super().__init__(*args)
        port = [free_port()]
        if self._num_ranks > 1:
            dist.broadcast_object_list(port, src=0)
        self._address, self._port, self._size = address, port[0], 1 + num_workers
        self._group: Any = None

    @property
    def init_info(self) -> dict[str, Any]:
        meeting = {"address": self._address, "port": self._port, "size": self._size, "engine": 0}
        return super().init_info | meeting

    def _send(self, memory: torch.Tensor) -> None:
        if self._rank != 0:
            return
        if self._group is None:
            self._group = join_nccl(self._address, self._port, 0, self._size, memory.device)
        broadcast(self._group, memory)

    def close(self) -> None:
        self._group = None


def export_memory(memory: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
    """The GPU of a piece of memory and what another process maps it with. The memory must live as long as its users."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(memory)  # type: ignore[no-untyped-call]
    return gpu_name(memory.device), arguments


def gpu_name(device: torch.device) -> str:
    """A name of the card itself, whatever number a process knows it by."""
    return str(torch.cuda.get_device_properties(device).uuid)


def import_memory(arguments: Sequence[Any], device: torch.device) -> torch.Tensor:
    """Maps what another process on the same GPU exported."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    own = list(arguments)
    own[6] = device.index  # the number by which the exporting process knows the GPU
    return rebuild_cuda_tensor(*own)  # type: ignore[no-any-return,no-untyped-call]


def join_nccl(address: str, port: int, rank: int, size: int, device: torch.device) -> Any:
    """vLLM's communicator between trainer and workers: rank 0 is the trainer. Returns once everybody has come."""
    from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

    # vLLM makes a stream of its own the current one of a process that has not chosen any: in a rank, for Megatron, too.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        return stateless_init_process_group(address, port, rank, size, device)


def broadcast(group: Any, memory: torch.Tensor) -> None:
    """From rank 0 to all; returns when this process's part is done."""
    stream = torch.cuda.Stream(memory.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        group.broadcast(memory, src=0, stream=stream)
    stream.synchronize()
