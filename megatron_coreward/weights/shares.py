"""What all engines need of one shard, and how the ranks that hold it share the sending of it. Pure.

Invariants (tests/weights/test_plan.py):
  1. Every row that a worker needs is sent by exactly one of the ranks that hold it.
  2. Each rank sends an equal share, except for half a row at each of its two cuts: at most `slack` bytes off.

What all engines together need of one shard of one layer is laid out on a line, engine after engine, worker after
worker, tensor after tensor. With R ranks that hold the shard, the line is cut into R shares of the same number of
bytes, each cut moved to the nearest border between two rows. If R divides the number of engines, every rank serves
whole engines. Cutting layer by layer keeps all copies busy at all times of a transfer that goes through the model in
order. What tensor-parallel ranks hold whole (norms, routers) is laid out worker by worker over the engines that one
data-parallel replica serves: so it comes from a rank that sends the worker larger things anyway.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_coreward.weights.layouts import Bounds, HFBlock

ByteArray = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """What one worker needs of one block of a shard."""

    tensor: int  # its place among the tensors of the segment
    slot: int  # its worker's place among those that need the segment
    bounds: Bounds
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return (self.bounds[0][1] - self.bounds[0][0]) * self.row_bytes

    def rows(self, start: int, stop: int) -> "Part":
        """Rows counted from the piece's first."""
        first = self.bounds[0][0]
        return Part(self.tensor, ((first + start, first + stop), *self.bounds[1:]), (stop - start) * self.row_bytes)


class Part(NamedTuple):
    """As much of a piece as one rank sends."""

    tensor: int
    bounds: Bounds
    nbytes: int


class Line:
    """What all engines need of one shard, cut evenly for the ranks that hold it (see the top of the file)."""

    def __init__(
        self, holders: Sequence[int], pieces: Sequence[Piece], num_slots: int, num_engines: int, together: int = 1
    ) -> None:
        """Lays out the line and cuts it.

        Args:
            holders: counted from the first rank of the segment.
            pieces: of one engine, by slot.
            together: how many engines (a divisor of their number) are laid out at a time, one slot of all, then the
                next. Such a bundle is treated as one engine with `num_slots * together` slots.
        """
        self.holders = tuple(holders)
        self._together, self._num_bundles = together, num_engines // together
        by_slot: list[list[Piece]] = [[] for _ in range(num_slots)]
        for piece in pieces:
            by_slot[piece.slot].append(piece)
        self._pieces = tuple(piece for mine in by_slot for _ in range(together) for piece in mine)
        self._first_piece = [0, *accumulate(len(mine) for mine in by_slot for _ in range(together))]
        self._starts = [0, *accumulate(piece.nbytes for piece in self._pieces)]  # within a bundle
        self._bundle_bytes = self._starts[-1]
        borders = [self._nearest_border(k) for k in range(1, len(holders))]
        self._cuts = [0, *(position for position, _ in borders), self._num_bundles * self._bundle_bytes]
        moved = [0, *(off for _, off in borders), 0]
        self.slack = np.asarray([a + b for a, b in pairwise(moved)], dtype=np.int64)  # [R] bytes, see invariant 2

    def _nearest_border(self, k: int) -> tuple[int, int]:
        """The border between two rows that is nearest to k/R of the line, and the most that it can be off."""
        copies = len(self.holders)
        ideal, remainder = divmod(k * self._num_bundles * self._bundle_bytes, copies)  # remainder: of a byte, in 1/R
        bundle, position = divmod(ideal, self._bundle_bytes)
        at = bisect_right(self._starts, position) - 1
        past, row = (position - self._starts[at]) * copies + remainder, self._pieces[at].row_bytes * copies
        nearest = (2 * past + row) // (2 * row)
        off = self._pieces[at].row_bytes // 2 if past % row else 0
        return bundle * self._bundle_bytes + self._starts[at] + nearest * self._pieces[at].row_bytes, off

    @property
    def fair_bytes(self) -> float:
        """What each holder would send if rows could be cut."""
        return self._cuts[-1] / len(self.holders)

    @cached_property
    def bytes_by_link(self) -> ByteArray:
        """[R, engines, slots] bytes that each holder sends to each worker."""
        edges = np.asarray([self._starts[first] for first in self._first_piece], dtype=np.int64)
        bundles = np.arange(self._num_bundles, dtype=np.int64)[:, None] * self._bundle_bytes
        cuts = np.asarray(self._cuts, dtype=np.int64)[:, None, None]
        begin = np.maximum(bundles + edges[:-1], cuts[:-1])
        end = np.minimum(bundles + edges[1:], cuts[1:])
        sizes = np.maximum(end - begin, 0).reshape(len(self.holders), self._num_bundles, -1, self._together)
        by_engine = sizes.swapaxes(2, 3).reshape(len(self.holders), self._num_bundles * self._together, -1)
        return np.asarray(by_engine)

    def sent(self, holder: int) -> Iterator[tuple[int, int, Part]]:
        """(engine, slot, part) for everything that a holder, by its place in `holders`, sends."""
        low, high = self._cuts[holder : holder + 2]
        for bundle in range(low // self._bundle_bytes, -(-high // self._bundle_bytes)):
            for number, (first, last) in enumerate(pairwise(self._first_piece)):
                slot, engine = divmod(number, self._together)
                for at in range(first, last):
                    part = self._clip(at, bundle, low, high)
                    if part:
                        yield bundle * self._together + engine, slot, part

    def received(self, engine: int, slot: int) -> Iterator[tuple[int, Part]]:
        """(holder's rank, part) for everything that a worker receives."""
        bundle, in_bundle = divmod(engine, self._together)
        number = slot * self._together + in_bundle
        for at in range(self._first_piece[number], self._first_piece[number + 1]):
            start = bundle * self._bundle_bytes + self._starts[at]
            holder = bisect_right(self._cuts, start) - 1
            while holder < len(self.holders) and self._cuts[holder] < start + self._pieces[at].nbytes:
                part = self._clip(at, bundle, *self._cuts[holder : holder + 2])
                if part:
                    yield self.holders[holder], part
                holder += 1

    def _clip(self, at: int, bundle: int, low: int, high: int) -> Part | None:
        """What lies between two cuts of a piece of a bundle; cuts fall between rows."""
        piece, start = self._pieces[at], bundle * self._bundle_bytes + self._starts[at]
        first = max(low - start, 0) // piece.row_bytes
        last = min(high - start, piece.nbytes) // piece.row_bytes
        return piece.rows(first, last) if first < last else None


def pieces_of(
    held: Iterable[HFBlock], needed: Sequence[dict[str, Bounds | None]], order: dict[str, int], item_bytes: int
) -> Iterator[Piece]:
    """What each slot needs of the blocks of a shard: slot by slot, tensors in HF order."""
    ordered = sorted(held, key=lambda block: (order[block.name], block.bounds))
    for slot, parts in enumerate(needed):
        for name, block in ordered:
            part = parts[name]
            if part is None:
                continue
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, part, strict=True))
            if all(start < stop for start, stop in common):
                yield Piece(order[name], slot, common, prod(b - a for a, b in common[1:]) * item_bytes)
