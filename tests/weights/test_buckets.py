"""Properties of bucket plans and tilings."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.weights.buckets import (
    ITEM_BYTES,
    TensorMeta,
    block_bounds,
    check_tiling,
    plan_buckets,
)

shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)
metas = st.lists(st.tuples(shapes, st.sampled_from(sorted(ITEM_BYTES))), min_size=1, max_size=30).map(
    lambda drawn: [TensorMeta(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)]
)


def dealt(tensors: list[TensorMeta], num_streams: int) -> list[list[TensorMeta]]:
    return [tensors[i::num_streams] for i in range(num_streams)]


@given(metas, st.integers(1, 20_000), st.integers(1, 4))
def test_buckets_hold_every_row_once_in_the_order_of_its_stream(
    tensors: list[TensorMeta], bucket_bytes: int, num_streams: int
) -> None:
    streams = dealt(tensors, num_streams)
    buckets = plan_buckets(streams, bucket_bytes)
    assert all(buckets)
    for stream in streams:
        names = {meta.name for meta in stream}
        pieces = [rows for bucket in buckets for rows in bucket if rows.name in names]
        for meta in stream:
            mine = [rows for rows in pieces if rows.name == meta.name]
            assert [rows.start for rows in mine] == [0, *(rows.stop for rows in mine[:-1])]
            assert mine[-1].stop == (meta.shape[0] if meta.shape else 1)
            assert sum(rows.nbytes for rows in mine) == meta.nbytes
        assert list(dict.fromkeys(rows.name for rows in pieces)) == [meta.name for meta in stream]


@given(metas, st.integers(1, 20_000), st.integers(1, 4))
def test_a_bucket_is_bounded_except_for_one_row_of_each_stream(
    tensors: list[TensorMeta], bucket_bytes: int, num_streams: int
) -> None:
    streams = [stream for stream in dealt(tensors, num_streams) if stream]
    largest = [max(meta.nbytes // (meta.shape[0] if meta.shape else 1) for meta in stream) for stream in streams]
    for bucket in plan_buckets(streams, bucket_bytes):
        assert sum(rows.nbytes for rows in bucket) <= bucket_bytes + sum(largest)
    if len(streams) == 1:
        assert all(
            sum(rows.nbytes for rows in bucket) <= max(bucket_bytes, largest[0])
            for bucket in plan_buckets(streams, bucket_bytes)
        )


def test_all_streams_have_something_to_send_in_every_bucket() -> None:
    long = [TensorMeta(f"long.{i}", (64, 16), "float32") for i in range(12)]
    short = [TensorMeta(f"short.{i}", (64, 16), "float32") for i in range(4)]
    for bucket in plan_buckets([long, short], 8192)[:-1]:
        sizes = [sum(rows.nbytes for rows in bucket if rows.name.startswith(kind)) for kind in ("long", "short")]
        assert sizes[0] == pytest.approx(3 * sizes[1], rel=0.05)


def test_only_large_tensors_are_cut() -> None:
    tensors = [
        TensorMeta("a", (10, 25), "float32"),
        TensorMeta("b", (3, 25), "float32"),
        TensorMeta("c", (9, 25), "float32"),
    ]
    buckets = [[(rows.name, rows.start, rows.stop) for rows in bucket] for bucket in plan_buckets([tensors], 1200)]
    assert buckets == [[("a", 0, 10)], [("b", 0, 3), ("c", 0, 9)]]
    buckets = [[(rows.name, rows.start, rows.stop) for rows in bucket] for bucket in plan_buckets([tensors], 500)]
    assert buckets == [
        [("a", 0, 5)],
        [("a", 5, 10)],
        [("b", 0, 3), ("c", 0, 2)],
        [("c", 2, 7)],
        [("c", 7, 9)],
    ]


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
        plan_buckets([tensors], bucket_bytes)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 0), "float32"), ((2,), "int8")])
def test_tensors_that_cannot_travel_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ValueError, match="tensor 'a'"):
        TensorMeta("a", shape, dtype)


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
    with pytest.raises(ValueError, match="'b', which is not among them"):
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
