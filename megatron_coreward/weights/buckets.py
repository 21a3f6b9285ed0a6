"""How the tensors of a model are cut into buckets. Pure.

Every party of a transfer (the ranks that send, the workers that receive) cuts alike from the same few facts, so only
bucket numbers travel between them.

Tensors come in streams, one for each group of ranks that holds a part of the model (a pipeline stage, a share of the
experts). Every bucket takes from all streams, in proportion to their bytes: so all ranks have something to send at all
times, whatever the order of the checkpoint. Within a large tensor it takes from all tensor-parallel parts alike.

Invariants (tests/weights/test_buckets.py):
  1. The pieces of all buckets are the tensors of each stream in the given order, each row exactly once.
  2. A bucket holds at most `bucket_bytes`, except that each stream brings one row at least.
  3. Only tensors that are larger than a quarter of a stream's share of a bucket are cut.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import NamedTuple

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A full tensor of the Hugging Face checkpoint, as it travels."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of ITEM_BYTES

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r}; allowed: {', '.join(ITEM_BYTES)}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"tensor {self.name!r}: shape {self.shape}; every size must be at least 1")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Rows(NamedTuple):
    """Rows `start` to `stop - 1` of a tensor: `tensor[start:stop]`."""

    name: str
    start: int
    stop: int
    nbytes: int


Bucket = tuple[Rows, ...]


def plan_buckets(
    streams: Sequence[Sequence[TensorMeta]], bucket_bytes: int, lanes: Callable[[str], int] = lambda name: 1
) -> tuple[Bucket, ...]:
    """Fills buckets of at most `bucket_bytes` with the tensors of all streams.

    Args:
        lanes: equal runs of rows into which a tensor, by its name, is cut first. A bucket takes the same of each, so
            that it has something for every tensor-parallel rank and worker.

    Example: with streams [a, b] and [c], of 400, 400 and 800 bytes, and 800 bytes a bucket, the buckets are [a, the
    first half of c] and [b, the second half of c].

    Raises:
        ValueError: no tensors, two tensors of the same name, or a bucket size below 1 byte.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    metas = [meta for stream in streams for meta in stream]
    if not metas:
        raise ValueError("there are no tensors to plan buckets for")
    seen: set[str] = set()
    for meta in metas:
        if meta.name in seen:
            raise ValueError(f"tensor {meta.name!r} appears twice")
        seen.add(meta.name)
    total = sum(meta.nbytes for meta in metas)
    shares = [max(1, bucket_bytes * sum(meta.nbytes for meta in stream) // total) for stream in streams]
    filled = [_fill(stream, share, lanes) for stream, share in zip(streams, shares, strict=True) if stream]
    return tuple(tuple(rows for part in parts for rows in part) for parts in zip_longest(*filled, fillvalue=()))


def _fill(stream: Sequence[TensorMeta], share: int, lanes: Callable[[str], int]) -> list[list[Rows]]:
    """A stream's part of every bucket."""
    parts: list[list[Rows]] = [[]]
    left = share
    for meta in stream:
        num_rows = meta.shape[0] if meta.shape else 1
        row_bytes, cut = meta.nbytes // num_rows, meta.nbytes > share // 4
        mine = lanes(meta.name) if cut else 1  # a tensor that fits is one piece, all lanes of it
        while mine > 1 and (mine > num_rows or 4 * mine * row_bytes > share):
            mine //= 2
        length, start = -(-num_rows // mine), 0  # of a lane, and what of it is in a bucket
        while start < length:
            whole = start == 0 and meta.nbytes <= left
            fitting = length if whole else min(length - start, max(0, left // (mine * row_bytes)) if cut else 0)
            if fitting == 0 and not parts[-1]:
                fitting = 1
            if fitting == 0:
                parts.append([])
                left = share
                continue
            pieces = [Rows(meta.name, 0, num_rows, meta.nbytes)] if whole else []
            for lane in range(0 if whole else mine):
                first = lane * length + start
                last = min(first + fitting, (lane + 1) * length, num_rows)
                if first < last:
                    pieces.append(Rows(meta.name, first, last, (last - first) * row_bytes))
            parts[-1] += pieces
            left, start = left - sum(rows.nbytes for rows in pieces), start + fitting
    return [part for part in parts if part]


def block_bounds(name: str, shape: Sequence[int], index: Index) -> tuple[tuple[int, int], ...]:
    """First and last-plus-one element of a block along each dimension.

    Raises:
        ValueError: the index is no non-empty rectangular block within the shape.
    """
    if len(index) != len(shape):
        raise ValueError(f"tensor {name!r}: index {index} has {len(index)} dimensions, the tensor has {len(shape)}")
    bounds = []
    for cut, size in zip(index, shape, strict=True):
        start = 0 if cut.start is None else cut.start
        stop = size if cut.stop is None else cut.stop
        if cut.step not in (None, 1) or not 0 <= start < stop <= size:
            raise ValueError(f"tensor {name!r}: {cut} is no block of a dimension of size {size}")
        bounds.append((start, stop))
    return tuple(bounds)


def check_tiling(metas: Iterable[TensorMeta], blocks: Iterable[tuple[str, Index]]) -> None:
    """Checks that the blocks of all ranks together cover every element of every tensor exactly once.

    Raises:
        ValueError: naming the first tensor of which elements are held by nobody or by two, or that is not known.
    """
    held: dict[str, list[tuple[tuple[int, int], ...]]] = {meta.name: [] for meta in metas}
    shapes = {meta.name: meta.shape for meta in metas}
    for name, index in blocks:
        if name not in held:
            raise ValueError(f"a block belongs to tensor {name!r}, which is not among them")
        held[name].append(block_bounds(name, shapes[name], index))
    for name, bounds in held.items():
        for one, other in combinations(bounds, 2):
            if _overlap(one, other):
                raise ValueError(f"tensor {name!r}: blocks {one} and {other} overlap")
        covered = sum(math.prod(stop - start for start, stop in block) for block in bounds)
        total = math.prod(shapes[name])
        if covered != total:
            raise ValueError(f"tensor {name!r}: blocks cover {covered} of its {total} elements")


def _overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))
