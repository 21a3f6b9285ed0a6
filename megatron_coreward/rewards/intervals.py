"""Sets of real numbers as intervals from left to right: unions, intersections and differences."""

from collections.abc import Callable
from functools import cmp_to_key

from megatron_coreward.rewards.expression import Node, number
from megatron_coreward.rewards.kinds import Piece, Region

# -1, 0 or 1 for less, equal or greater; None if one is no real number (`sameness.Arithmetic.order`).
Order = Callable[[Node, Node], int | None]


def pieces_of(region: Region, order: Order) -> list[Piece] | None:
    """The intervals of a region from left to right, none of them touching; None if an end is no real number."""
    parts: list[list[Piece]] = []
    for piece in region.pieces:
        part = [piece] if isinstance(piece, Piece) else pieces_of(piece, order)
        if part is None or not all(_is_proper(p, order) for p in part):
            return None
        parts.append(part)
    intervals = _Intervals(order)
    match region.operation:
        case "union":
            return intervals.union([piece for part in parts for piece in part])
        case "intersection":
            result = parts[0]
            for part in parts[1:]:
                result = intervals.union(
                    [c for p in result for q in part if (c := intervals.overlap(p, q)) is not None]
                )
            return intervals.union(result)
        case _:
            result = parts[0]
            for part in parts[1:]:
                for q in part:
                    result = [left for p in result for left in intervals.without(p, q)]
            return intervals.union(result)


def _is_proper(piece: Piece, order: Order) -> bool:
    found = order(piece.low, piece.high)
    return found is not None and (found < 0 or (found == 0 and piece.low_closed and piece.high_closed))


class _Intervals:
    """Set operations on intervals whose ends can be ordered."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def _compare(self, a: Node, b: Node) -> int:
        return self._order(a, b) or 0

    def _starts_before(self, p: Piece, q: Piece) -> int:
        return self._compare(p.low, q.low) or q.low_closed - p.low_closed

    def union(self, pieces: list[Piece]) -> list[Piece]:
        merged: list[Piece] = []
        for piece in self._sorted(pieces):
            if merged and self._touches(merged[-1], piece):
                last = merged[-1]
                further = self._compare(piece.high, last.high)
                closed = {1: piece.high_closed, -1: last.high_closed}.get(
                    further, piece.high_closed or last.high_closed
                )
                high = piece.high if further > 0 else last.high
                merged[-1] = Piece(last.low, last.low_closed, high, closed)
            else:
                merged.append(piece)
        return merged

    def _sorted(self, pieces: list[Piece]) -> list[Piece]:
        return sorted(pieces, key=cmp_to_key(self._starts_before))

    def _touches(self, left: Piece, right: Piece) -> bool:
        gap = self._compare(right.low, left.high)
        return gap < 0 or (gap == 0 and (right.low_closed or left.high_closed))

    def overlap(self, p: Piece, q: Piece) -> Piece | None:
        low, high = self._compare(p.low, q.low), self._compare(p.high, q.high)
        start, end = (p if low > 0 else q), (p if high < 0 else q)
        low_closed = p.low_closed and q.low_closed if low == 0 else start.low_closed
        high_closed = p.high_closed and q.high_closed if high == 0 else end.high_closed
        size = self._compare(start.low, end.high)
        if size > 0 or (size == 0 and not (low_closed and high_closed)):
            return None
        return Piece(start.low, low_closed, end.high, high_closed)

    def without(self, p: Piece, q: Piece) -> list[Piece]:
        infinity = Node("constant", "infinity")
        outside = [
            Piece(Node("multiply", args=(number(-1), infinity)), False, q.low, not q.low_closed),
            Piece(q.high, not q.high_closed, infinity, False),
        ]
        return [left for side in outside if (left := self.overlap(p, side)) is not None]
