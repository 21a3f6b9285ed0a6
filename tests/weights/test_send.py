"""Several ranks fill the full tensors of a bucket, each with its own blocks."""

import multiprocessing
import struct
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import SegmentLayout, TensorMeta
from megatron_coreward.weights.segment import open_segment, segment_path, tensor_at
from megatron_coreward.weights.send import BlockHash, LocalBlock, SharedMemorySender

METAS = [
    TensorMeta("by_rows", (5, 4), "float32"),
    TensorMeta("by_columns", (3, 6), "bfloat16"),
    TensorMeta("whole", (7,), "float32"),
]


def full(name: str) -> torch.Tensor:
    meta = next(m for m in METAS if m.name == name)
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(meta.shape, generator=generator)


def blocks_of(rank: int) -> list[LocalBlock]:
    rows = (slice(0, 3), slice(None)) if rank == 0 else (slice(3, 5), slice(None))
    columns = (slice(None), slice(0, 2)) if rank == 0 else (slice(None), slice(2, 6))
    held = [
        LocalBlock("by_rows", rows, lambda: full("by_rows")[rows]),
        LocalBlock("by_columns", columns, lambda: full("by_columns")[columns]),
    ]
    return [*held, LocalBlock("whole", (slice(None),), lambda: full("whole"))] if rank == 1 else held


def write_all(rank: int, segment: str) -> list[BlockHash]:
    """What another actor process does."""
    sender = SharedMemorySender(blocks_of(rank), METAS, 10_000, segment, rank, 2)
    hashes = sender.write(0, version=5, hashes=True)
    sender.close()
    return hashes


@pytest.fixture
def segment() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    yield name
    segment_path(name).unlink(missing_ok=True)


def read(layout: SegmentLayout) -> dict[str, torch.Tensor]:
    """All tensors, with their buckets one after the other in the slots."""
    memory = open_segment(layout, writable=True)
    return {
        entry.meta.name: tensor_at(memory, layout.slot_start(i) + entry.offset, entry.meta).clone()
        for i, bucket in enumerate(layout.buckets)
        for entry in bucket.entries
    }


def test_two_processes_fill_the_tensors_in_the_dtype_that_travels(segment: str) -> None:
    first = SharedMemorySender(blocks_of(0), METAS, 10_000, segment, 0, 2)
    first.write(0, version=5)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        hashes = pool.submit(write_all, 1, segment).result(timeout=120)
    tensors = read(first.layout)
    first.close()
    for meta in METAS:
        assert torch.equal(tensors[meta.name], full(meta.name).to(getattr(torch, meta.dtype)))
    assert [(h.name, h.bounds) for h in hashes] == [
        ("by_rows", ((3, 5), (0, 4))),
        ("by_columns", ((0, 3), (2, 6))),
        ("whole", ((0, 7),)),
    ]
    for h in hashes:
        block = tensors[h.name][tuple(slice(a, b) for a, b in h.bounds)].contiguous().view(-1)
        assert h.crc32 == zlib.crc32(block.view(torch.uint8).numpy())


def test_a_bucket_may_be_written_while_the_one_before_is_read(segment: str) -> None:
    sender = SharedMemorySender([*blocks_of(0), *blocks_of(1)], METAS, 1, segment, 0, 2)
    assert sender.num_buckets == 3
    sender.write(0, version=5)
    sender.write(1, version=5)
    tensors = read(sender.layout)
    assert torch.equal(tensors["by_rows"], full("by_rows"))
    assert torch.equal(tensors["by_columns"], full("by_columns").bfloat16())
    sender.write(2, version=5)  # into the slot of bucket 0
    assert torch.equal(read(sender.layout)["whole"], full("whole"))
    sender.close()


def test_each_rank_leaves_a_mark_of_version_and_bucket_behind_its_blocks(segment: str) -> None:
    ranks = [SharedMemorySender(blocks_of(rank), METAS, 1, segment, rank, 2) for rank in range(2)]
    ranks[0].write(0, version=5)
    ranks[0].write(2, version=6)  # into the slot of bucket 0
    ranks[1].write(1, version=7)
    layout, memory = ranks[0].layout, open_segment(ranks[0].layout, writable=False)
    marks = {(b, r): struct.unpack_from("<2q", memory, layout.mark_start(b, r)) for b in (0, 1) for r in (0, 1)}
    assert marks == {(0, 0): (6, 2), (0, 1): (0, 0), (1, 0): (0, 0), (1, 1): (7, 1)}
    for sender in reversed(ranks):
        sender.close()


def test_what_is_read_follows_the_weights(segment: str) -> None:
    weight = torch.zeros(7)
    sender = SharedMemorySender([LocalBlock("whole", (slice(None),), lambda: weight)], METAS[2:], 64, segment, 0, 2)
    sender.write(0, version=5)
    weight += 1
    sender.write(0, version=5)
    assert torch.equal(read(sender.layout)["whole"], torch.ones(7))
    sender.close()


def test_ranks_that_do_not_agree_on_the_tensors_find_out_at_the_first_write(segment: str) -> None:
    first = SharedMemorySender(blocks_of(0), METAS, 10_000, segment, 0, 2)
    other = SharedMemorySender([], METAS[:2], 10_000, segment, 1, 2)
    with pytest.raises(RunError, match="bytes, expected|other tensors"):
        other.write(0, version=5)
    first.close()


def test_a_rank_that_writes_before_rank_0_has_created_the_segment_is_told_so(segment: str) -> None:
    with pytest.raises(RunError, match="rank 0 creates it"):
        SharedMemorySender([], METAS, 10_000, segment, 1, 2).write(0, version=5)


def test_a_block_outside_its_tensor_is_refused(segment: str) -> None:
    block = LocalBlock("by_rows", (slice(3, 6), slice(None)), lambda: torch.zeros(3, 4))
    with pytest.raises(ValueError, match="'by_rows'.*no block of a dimension of size 5"):
        SharedMemorySender([block], METAS, 10_000, segment, 0, 2)


def test_a_block_of_an_unknown_tensor_is_refused(segment: str) -> None:
    with pytest.raises(ValueError, match="'other', which is not among"):
        SharedMemorySender([LocalBlock("other", (slice(None),), torch.zeros)], METAS, 10_000, segment, 0, 2)


@pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(7, dtype=torch.int64)])
def test_a_value_of_another_shape_or_kind_is_refused(segment: str, value: torch.Tensor) -> None:
    sender = SharedMemorySender([LocalBlock("whole", (slice(None),), lambda: value)], METAS, 10_000, segment, 0, 2)
    with pytest.raises(ValueError, match=r"'whole': read .*, expected a float tensor \(7,\)"):
        sender.write(0, version=5)
    sender.close()
