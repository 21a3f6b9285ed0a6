"""Micro-batches as packs: sequences laid end to end, no token of padding inside, a token budget for each.

Pure planning: which sequences share a pack, on which data-parallel rank. The tensors of a pack are built later, on the
rank that runs it (`actor.microbatch`).

Invariants (tests/actor/test_packing.py):
  1. Every sequence is in exactly one pack.
  2. All ranks have the same number of packs, a multiple of `multiple_of`; all packs of a plan have the same number of
     tokens, a multiple of `align`, so that pipeline and expert-parallel ranks exchange equal shapes.
  3. No pack exceeds the budget, unless it holds a single sequence that does.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


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
    lengths: Sequence[int], num_ranks: int, token_budget: int, multiple_of: int = 1, align: int = 1
) -> PackPlan:
    """Spreads sequences over ranks and packs so that the packs are few and nearly equal.

    Longest first into the emptiest pack, with as many packs as it takes to respect the budget; O(S log S) a try.

    Args:
        lengths: tokens of each of the S sequences.
        num_ranks: data-parallel size.
        token_budget: tokens a pack may hold.
        multiple_of: of the number of packs a rank (interleaved pipelines need a multiple of the pipeline size).
        align: of the tokens of a pack (sequence parallelism cuts a pack over the tensor-parallel ranks).

    Raises:
        ValueError: no sequences.
    """
    if len(lengths) == 0:
        raise ValueError("there are no sequences to pack")
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
    # Pack p goes to rank p mod num_ranks: equal loads lie side by side, so ranks finish together.
    packs = tuple(
        tuple(tuple(sorted(contents[i * num_ranks + rank])) for i in range(per_rank)) for rank in range(num_ranks)
    )
    return PackPlan(packs, num_tokens)


@dataclass(frozen=True, slots=True)
class Share:
    """One data-parallel rank's part of a plan, its rows renumbered from 0 in the order of `rows`."""

    rows: tuple[int, ...]  # of the whole batch
    packs: tuple[tuple[int, ...], ...]  # of rows within the share
    num_tokens: int


def shares(plan: PackPlan) -> list[Share]:
    """The plan cut by data-parallel rank, so that a rank is sent its own sequences only."""
    result = []
    for packs in plan.packs:
        rows = tuple(sorted(row for pack in packs for row in pack))
        place = {row: i for i, row in enumerate(rows)}
        result.append(Share(rows, tuple(tuple(place[row] for row in pack) for pack in packs), plan.num_tokens))
    return result
