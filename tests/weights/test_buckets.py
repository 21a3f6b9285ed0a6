"""Properties of bucket plans, segment layouts and tilings."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.weights.buckets import (
    ALIGNMENT,
    ITEM_BYTES,
    SegmentLayout,
    TensorMeta,
    block_bounds,
    check_tiling,
    plan_buckets,
)

shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)
metas = st.lists(st.tuples(shapes, st.sampled_from(sorted(ITEM_BYTES))), min_size=1, max_size=30).map(
    lambda drawn: [TensorMeta(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)]
)


@given(metas, st.integers(1, 20_000))
def test_buckets_hold_every_tensor_once_in_order_and_whole(tensors: list[TensorMeta], bucket_bytes: int) -> None:
    buckets = plan_buckets(tensors, bucket_bytes)
    assert [entry.meta for bucket in buckets for entry in bucket.entries] == tensors
    for bucket in buckets:
        assert bucket.entries
        assert bucket.nbytes % ALIGNMENT == 0
        assert all(entry.offset % ALIGNMENT == 0 for entry in bucket.entries)
        assert all(a.offset + a.meta.nbytes <= b.offset for a, b in pairwise(bucket.entries))
        last = bucket.entries[-1]
        assert last.offset + last.meta.nbytes <= bucket.nbytes < last.offset + last.meta.nbytes + ALIGNMENT
        assert len(bucket.entries) == 1 or last.offset + last.meta.nbytes <= bucket_bytes


@given(metas, st.integers(1, 20_000))
def test_no_two_neighbouring_buckets_would_fit_into_one(tensors: list[TensorMeta], bucket_bytes: int) -> None:
    for one, other in pairwise(plan_buckets(tensors, bucket_bytes)):
        assert one.nbytes + other.entries[0].meta.nbytes > bucket_bytes


def test_a_tensor_larger_than_a_bucket_travels_alone() -> None:
    small, large = TensorMeta("small", (4,), "float32"), TensorMeta("large", (1000,), "float32")
    buckets = plan_buckets([small, large, TensorMeta("last", (4,), "float32")], 256)
    assert [[entry.meta.name for entry in bucket.entries] for bucket in buckets] == [["small"], ["large"], ["last"]]


@pytest.mark.parametrize(
    ("tensors", "bucket_bytes", "complaint"),
    [
        ([], 64, "no tensors"),
        ([TensorMeta("a", (1,), "float32")] * 2, 64, "'a' appears twice"),
        ([TensorMeta("a", (1,), "float32")], 0, "bucket_bytes is 0"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(tensors: list[TensorMeta], bucket_bytes: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan_buckets(tensors, bucket_bytes)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 0), "float32"), ((2,), "int8")])
def test_tensors_that_cannot_travel_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="tensor 'a'"):
        TensorMeta("a", shape, dtype)


@given(metas, st.integers(1, 20_000), st.integers(1, 4))
def test_a_layout_is_the_same_after_its_journey_as_plain_data(
    tensors: list[TensorMeta], bucket_bytes: int, num_slots: int
) -> None:
    layout = SegmentLayout("run", tuple(tensors), bucket_bytes, num_slots)
    copy = SegmentLayout.from_json(layout.to_json())
    assert copy == layout
    assert copy.digest == layout.digest
    assert SegmentLayout("run", tuple(tensors), bucket_bytes + 1, num_slots).digest != layout.digest


@given(metas, st.integers(1, 20_000), st.integers(2, 4))
def test_consecutive_buckets_lie_in_different_slots_within_the_segment(
    tensors: list[TensorMeta], bucket_bytes: int, num_slots: int
) -> None:
    layout = SegmentLayout("run", tuple(tensors), bucket_bytes, num_slots)
    starts = [layout.slot_start(i) for i in range(len(layout.buckets))]
    for start, bucket in zip(starts, layout.buckets, strict=True):
        assert start % ALIGNMENT == 0
        assert start + bucket.nbytes <= layout.nbytes
    for (a, bucket), b in zip(pairwise(zip(starts, layout.buckets, strict=True)), starts[1:], strict=True):
        del bucket
        assert abs(a[0] - b) >= layout.slot_bytes


def test_a_bucket_that_does_not_exist_is_an_error() -> None:
    layout = SegmentLayout("run", (TensorMeta("a", (1,), "float32"),), 64)
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"bucket {index} does not exist"):
            layout.bucket(index)


@given(st.data())
def test_any_grid_of_cuts_tiles_and_any_missing_or_doubled_piece_shows(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple))
    pieces: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
        edges = [0, *cuts, size]
        pieces = [(*piece, slice(a, b)) for piece in pieces for a, b in pairwise(edges)]
    meta = TensorMeta("t", shape, "float32")
    blocks = [("t", piece) for piece in data.draw(st.permutations(pieces))]
    check_tiling([meta], blocks)
    with pytest.raises(ValueError, match=r"cover .* of its"):
        check_tiling([meta], blocks[1:])
    with pytest.raises(ValueError, match="overlap"):
        check_tiling([meta], [*blocks, blocks[0]])


def test_a_block_of_a_tensor_that_is_not_sent_is_an_error() -> None:
    with pytest.raises(ValueError, match="'b', which is not published"):
        check_tiling([TensorMeta("a", (1,), "float32")], [("a", (slice(None),)), ("b", (slice(None),))])


@pytest.mark.parametrize(
    "index", [(slice(0, 2),), (slice(0, 5), slice(None)), (slice(2, 2), slice(None)), (slice(0, 4, 2), slice(None))]
)
def test_an_index_that_is_no_block_of_the_tensor_is_an_error(index: tuple[slice, ...]) -> None:
    with pytest.raises(ValueError, match="tensor 't'"):
        block_bounds("t", (4, 3), index)


def test_open_ends_of_an_index_reach_to_the_edges() -> None:
    bounds = block_bounds("t", (4, 3), (slice(None, 2), slice(1, None)))
    assert bounds == ((0, 2), (1, 3))
    assert math.prod(b - a for a, b in bounds) == 4
