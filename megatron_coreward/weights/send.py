"""The sending side of a weight transfer through shared memory: every actor rank writes its own blocks, nobody gathers.

A tensor-parallel actor fills a full Hugging Face tensor in place: each rank copies the rectangular blocks that it
holds into the tensor's place in the slot of the current bucket. One writer a block, so the writes need no lock.

The order of a transfer, which the trainer keeps: all ranks construct; all ranks `write(i)`; then the engines load
bucket i, while the ranks may already `write(i + 1)`, because it goes into another slot. Behind its blocks, each rank
leaves a mark of version and bucket, by which an engine knows that a slot is complete and fresh.
"""

import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_coreward.weights.buckets import Index, SegmentLayout, TensorMeta, block_bounds
from megatron_coreward.weights.segment import OwnedSegment, open_segment, tensor_at


@dataclass(frozen=True, slots=True)
class LocalBlock:
    """A rectangular block of the HF tensor `name` that this rank holds: `hf[index] == read()`."""

    name: str
    index: Index
    read: Callable[[], torch.Tensor]  # any device, any float dtype, any strides


@dataclass(frozen=True, slots=True)
class BlockHash:
    """Checksum of a block as it was written."""

    name: str
    bounds: tuple[tuple[int, int], ...]  # first and last-plus-one element along each dimension
    crc32: int


class Sender(Protocol):
    """One rank's end of a transfer, over whatever carries it."""

    @property
    def init_info(self) -> dict[str, Any]:
        """What the receiving engines need to know, as plain data (`RolloutEngine.start_update`)."""
        ...

    def write(self, bucket_index: int, version: int, hashes: bool = False) -> list[BlockHash]:
        """Sends this rank's part of a bucket; returns checksums to be compared where the engines load, if asked to."""
        ...

    def close(self) -> None:
        """Lets go of everything. May be repeated."""
        ...


def crc32(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's elements, row by row."""
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


class SharedMemorySender:
    """One rank's end of the transfer. Rank 0 creates the segment; the others attach to it at their first write.

    Over all ranks, the blocks must tile each tensor exactly once (`buckets.check_tiling` checks it).
    """

    def __init__(
        self,
        blocks: Sequence[LocalBlock],
        metas: Sequence[TensorMeta],
        bucket_bytes: int,
        segment: str,
        rank: int,
        num_ranks: int,
        num_slots: int = 2,
    ) -> None:
        """Opens this rank's end.

        Args:
            blocks: what this rank holds; may be empty.
            metas: all tensors, in the order in which they travel; the same on every rank.
            segment: name of the segment on this host, unique to the run and to the set of weights.

        Raises:
            ValueError: a block of an unknown tensor, or one that does not fit the tensor's shape.
            RunError: rank 0 could not create the segment.
        """
        self.layout = SegmentLayout(segment, tuple(metas), bucket_bytes, num_slots, num_ranks)
        by_name: dict[str, list[LocalBlock]] = {meta.name: [] for meta in metas}
        shapes = {meta.name: meta.shape for meta in metas}
        for block in blocks:
            if block.name not in by_name:
                raise ValueError(f"this rank holds a block of {block.name!r}, which is not among the tensors to send")
            block_bounds(block.name, shapes[block.name], block.index)
            by_name[block.name].append(block)
        self._blocks, self._rank = by_name, rank
        self._owned = OwnedSegment(self.layout) if rank == 0 else None
        self._memory: mmap.mmap | None = self._owned.memory if self._owned else None

    @property
    def num_buckets(self) -> int:
        return len(self.layout.buckets)

    @property
    def init_info(self) -> dict[str, Any]:
        """What the receiving engines need to know, as plain data (`RolloutEngine.start_update`)."""
        return self.layout.to_json()

    @torch.no_grad()
    def write(self, bucket_index: int, version: int, hashes: bool = False) -> list[BlockHash]:
        """Copies this rank's blocks of a bucket into the bucket's slot, in the dtype of the tensor that travels.

        Returns a checksum of each block that was written, if asked for them.

        Raises:
            ValueError: what a block's `read` returned does not have the shape of the block, or is no float tensor.
            RunError: the segment is not there, or was made for other tensors.
        """
        if self._memory is None:
            self._memory = open_segment(self.layout, writable=True)
        slot = self.layout.slot_start(bucket_index)
        written = []
        for entry in self.layout.bucket(bucket_index).entries:
            blocks = self._blocks[entry.meta.name]
            if not blocks:
                continue
            tensor = tensor_at(self._memory, slot + entry.offset, entry.meta)
            for block in blocks:
                target, value = tensor[block.index], block.read()
                if value.shape != target.shape or not value.is_floating_point():
                    raise ValueError(
                        f"block {block.index} of {block.name!r}: read {value.dtype} {tuple(value.shape)}, "
                        f"expected a float tensor {tuple(target.shape)}"
                    )
                target.copy_(value)
                if hashes:
                    bounds = block_bounds(block.name, entry.meta.shape, block.index)
                    written.append(BlockHash(block.name, bounds, crc32(target)))
        mark = self.layout.mark_start(bucket_index, self._rank)
        struct.pack_into("<2q", self._memory, mark, version, bucket_index)
        return written

    def close(self) -> None:
        """Lets go of the segment; rank 0 removes it. May be repeated."""
        self._memory = None
        if self._owned:
            self._owned.close()
            self._owned = None
