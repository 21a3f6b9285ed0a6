"""Micro-batches as packs: sequences laid end to end, no token of padding inside, a token budget for each.

Pure planning: which sequences share a pack, on which data-parallel rank. The tensors of a pack are built later, on the
rank that runs it (`actor.microbatch`).

Invariants (tests/actor/test_packing.py):
  1. Every sequence is in exactly one pack.
  2. All ranks have the same number of packs, a multiple of `multiple_of`; all packs of a plan have the same number of
     tokens, a multiple of `align`, so that pipeline and expert-parallel ranks exchange equal shapes.
  3. No pack exceeds the budget, unless it holds a single sequence that does.
  4. The operations of attention of two ranks differ by at most those of one pack.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackPlan:
    """`packs[rank][i]`: the sequences of pack i of a data-parallel rank; every pack is padded to `num_tokens`."""

    packs: tuple[tuple[tuple[int, ...], ...], ...]
    num_tokens: int

    @property
    def num_packs(self) -> int:
        """Of each rank."""
        return len(self.packs[0])


def plan_packs(
    lengths: Sequence[int], num_ranks: int, token_budget: int, multiple_of: int = 1, align: int = 1, pad: int = 1
) -> PackPlan:
    """Spreads sequences over ranks and packs so that the packs are few and nearly equal.

    Longest first into the emptiest pack, with as many packs as it takes to respect the budget; O(S log S) a try.

    Args:
        lengths: tokens of each of the S sequences.
        num_ranks: data-parallel size.
        token_budget: tokens a pack may hold.
        multiple_of: of the number of packs a rank (interleaved pipelines need a multiple of the pipeline size).
        align: of the tokens of a pack (sequence parallelism cuts a pack over the tensor-parallel ranks).

        pad: of the tokens that each sequence takes (context parallelism cuts a sequence into equal pieces).

    Raises:
        ValueError: no sequences.
    """
    if len(lengths) == 0:
        raise ValueError("there are no sequences to pack")
    lengths = [-(-length // pad) * pad for length in lengths]
    budget = max(token_budget // align * align, max(lengths))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, -(-sum(lengths) // (budget * num_ranks)))
    while True:
        per_rank = -(-per_rank // multiple_of) * multiple_of
        heap = [(0, pack) for pack in range(num_ranks * per_rank)]
        contents: list[list[int]] = [[] for _ in heap]
        for i in order:
            tokens, pack = heap[0]
            heapq.heapreplace(heap, (tokens + lengths[i], pack))
            contents[pack].append(i)
        fullest = max(tokens for tokens, _ in heap)
        if fullest <= budget:
            break
        per_rank += 1
    num_tokens = -(-fullest // align) * align
    return PackPlan(_balance([tuple(sorted(rows)) for rows in contents], lengths, num_ranks), num_tokens)


def _balance(
    packs: Sequence[tuple[int, ...]], lengths: Sequence[int], num_ranks: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Packs of about equal tokens, given to ranks so that attention is balanced too, whose operations grow with the
    square of a sequence. Round by round, most operations first, a rank that has had few gets many: packs that run at
    the same time are alike, and ranks finish together."""

    def operations(rows: tuple[int, ...]) -> int:
        return sum(lengths[row] ** 2 for row in rows)

    order = sorted(packs, key=lambda rows: (-operations(rows), rows))
    loads: list[int] = [0] * num_ranks
    of_ranks: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    for first in range(0, len(order), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, rows in zip(ranks, order[first : first + num_ranks], strict=True):
            of_ranks[rank].append(rows)
            loads[rank] += operations(rows)
    return tuple(map(tuple, of_ranks))


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """One data-parallel rank's part of a plan, its rows renumbered from 0 in the order of `rows`."""

    rows: tuple[int, ...]  # of the whole batch
    packs: tuple[tuple[int, ...], ...]  # of rows within the share
    num_tokens: int


def micro_batch_plans(plan: PackPlan) -> list[MicroBatchPlan]:
    """The plan cut by data-parallel rank, so that a rank is sent its own sequences only."""
    result = []
    for packs in plan.packs:
        rows = tuple(sorted(row for pack in packs for row in pack))
        place = {row: i for i, row in enumerate(rows)}
        result.append(MicroBatchPlan(rows, tuple(tuple(place[row] for row in pack) for pack in packs), plan.num_tokens))
    return result


@dataclass(frozen=True, slots=True)
class ContextRank:
    """Which of the ranks this is that share the tokens of every pack (context parallelism)."""

    rank: int = 0
    size: int = 1

    @property
    def multiple(self) -> int:
        """Tokens of a sequence are padded to a multiple of this."""
        return 2 * self.size if self.size > 1 else 1


def local_tokens(bounds: Sequence[int], context: ContextRank) -> NDArray[np.int64]:
    """The tokens of a pack that a context-parallel rank holds, in its order.

    Of 2 C equal pieces of a sequence, rank r has pieces r and 2 C - 1 - r: early tokens attend to few others, late ones
    to many, so the ranks' work is equal. (Transformer Engine's order, `thd_get_partitioned_indices`.)

    Args:
        bounds: [N + 1] where the sequences of the pack begin and end; lengths are multiples of 2 C.
    """
    if context.size == 1:
        return np.arange(bounds[-1], dtype=np.int64)
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        size = (stop - start) // (2 * context.size)
        for piece in (context.rank, 2 * context.size - 1 - context.rank):
            pieces.append(np.arange(start + piece * size, start + (piece + 1) * size, dtype=np.int64))
    return np.concatenate(pieces)
