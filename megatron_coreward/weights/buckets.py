"""How the tensors of a model are cut into buckets, and the buckets laid out in a shared segment. Pure.

Every party of a transfer (the ranks that write, the engines that read) makes the same plan from the same few facts, so
only bucket numbers travel between them.

Invariants (tests/weights/test_buckets.py):
  1. The entries of all buckets, in order, are the tensors in the given order, each exactly once and never split.
  2. Within a bucket, entries start at multiples of ALIGNMENT bytes and do not overlap.
  3. A bucket with several entries holds at most `bucket_bytes`; a larger tensor is alone in its bucket.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

ALIGNMENT = 64  # bytes: a cache line, and enough for any vector load
HEADER_BYTES = 65536  # before the slots: the digest of the layout, and who has written what
MARK_BYTES = 16  # version and bucket, two 64-bit integers
NO_BUCKET = -1  # in place of a bucket: the update that is under way is given up
_MARKS = 64  # byte of the first mark
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


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and the byte at which it starts within its bucket."""

    meta: TensorMeta
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together; `nbytes` is a multiple of ALIGNMENT."""

    entries: tuple[Entry, ...]
    nbytes: int


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_buckets(metas: Sequence[TensorMeta], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fills buckets of at most `bucket_bytes` with the tensors, in order.

    Raises:
        ValueError: no tensors, two tensors of the same name, or a bucket size below 1 byte.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    if not metas:
        raise ValueError("there are no tensors to plan buckets for")
    seen: set[str] = set()
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    filled = 0
    for meta in metas:
        if meta.name in seen:
            raise ValueError(f"tensor {meta.name!r} appears twice")
        seen.add(meta.name)
        if entries and filled + meta.nbytes > bucket_bytes:
            buckets.append(Bucket(tuple(entries), filled))
            entries, filled = [], 0
        entries.append(Entry(meta, filled))
        filled += _align(meta.nbytes)
    return (*buckets, Bucket(tuple(entries), filled))


@dataclass(frozen=True)
class SegmentLayout:
    """A shared segment: a header page, then `num_slots` slots through which the buckets pass in turn."""

    segment: str  # name of the segment on the host
    metas: tuple[TensorMeta, ...]
    bucket_bytes: int
    num_slots: int = 2
    num_writers: int = 1

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ValueError(f"num_slots is {self.num_slots}; it must be at least 1")
        most = (HEADER_BYTES - _MARKS) // (MARK_BYTES * self.num_slots)
        if not 1 <= self.num_writers <= most:
            raise ValueError(f"num_writers is {self.num_writers}; allowed for {self.num_slots} slots: 1 to {most}")

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return plan_buckets(self.metas, self.bucket_bytes)

    @cached_property
    def slot_bytes(self) -> int:
        return max(bucket.nbytes for bucket in self.buckets)

    @property
    def nbytes(self) -> int:
        return HEADER_BYTES + self.num_slots * self.slot_bytes

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that two parties share exactly if they mean the same layout."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).digest()

    def bucket(self, index: int) -> Bucket:
        """Raises IndexError for a number that no bucket has, negative ones included."""
        if not 0 <= index < len(self.buckets):
            raise IndexError(f"bucket {index} does not exist; there are {len(self.buckets)}, counted from 0")
        return self.buckets[index]

    def slot_start(self, bucket_index: int) -> int:
        """The byte of the segment at which the slot of a bucket starts."""
        return HEADER_BYTES + bucket_index % self.num_slots * self.slot_bytes

    def mark_start(self, bucket_index: int, writer: int) -> int:
        """The byte of the segment where a writer says that a bucket is in its slot, and of which version."""
        return _MARKS + MARK_BYTES * (bucket_index % self.num_slots * self.num_writers + writer)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for any transport; `from_json` reads it."""
        return {
            "segment": self.segment,
            "tensors": [[m.name, list(m.shape), m.dtype] for m in self.metas],
            "bucket_bytes": self.bucket_bytes,
            "num_slots": self.num_slots,
            "num_writers": self.num_writers,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SegmentLayout":
        metas = tuple(TensorMeta(name, tuple(shape), dtype) for name, shape, dtype in data["tensors"])
        return cls(data["segment"], metas, data["bucket_bytes"], data["num_slots"], data["num_writers"])


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
            raise ValueError(f"a block belongs to tensor {name!r}, which is not published")
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
