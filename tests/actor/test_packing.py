"""The three invariants that `actor.packing` states, over many batches."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.actor.packing import ContextRank, local_tokens, micro_batch_plans, plan_packs

lengths_of = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(
    lengths=lengths_of,
    ranks=st.integers(1, 8),
    budget=st.integers(1, 1000),
    multiple=st.integers(1, 4),
    align=st.sampled_from([1, 2, 4, 8]),
)
def test_plans_keep_their_invariants(lengths: list[int], ranks: int, budget: int, multiple: int, align: int) -> None:
    plan = plan_packs(lengths, ranks, budget, multiple, align)
    packs = [pack for rank in plan.packs for pack in rank]
    assert Counter(row for pack in packs for row in pack) == Counter(range(len(lengths)))
    assert len(plan.packs) == ranks
    assert {len(rank) for rank in plan.packs} == {plan.num_packs}
    assert plan.num_packs % multiple == 0
    assert plan.num_tokens % align == 0
    for pack in packs:
        tokens = sum(lengths[row] for row in pack)
        assert tokens <= plan.num_tokens
        assert tokens <= budget or max(lengths) > budget // align * align


@given(lengths=lengths_of, ranks=st.integers(1, 8), budget=st.integers(300, 2000))
def test_ranks_have_about_the_same_operations_of_attention(lengths: list[int], ranks: int, budget: int) -> None:
    plan = plan_packs(lengths, ranks, budget)
    of_packs = [[sum(lengths[row] ** 2 for row in pack) for pack in rank] for rank in plan.packs]
    totals = [sum(rank) for rank in of_packs]
    assert max(totals) - min(totals) <= max(max(rank) for rank in of_packs)


@given(lengths=st.lists(st.integers(20, 40), min_size=64, max_size=256))
def test_packs_of_alike_sequences_are_nearly_full(lengths: list[int]) -> None:
    plan = plan_packs(lengths, 2, 512)
    assert sum(lengths) >= 0.75 * plan.num_tokens * plan.num_packs * 2


def test_a_plan_is_a_function_of_its_arguments() -> None:
    lengths = [7, 3, 9, 9, 2, 5] * 20
    assert plan_packs(lengths, 4, 64) == plan_packs(lengths, 4, 64)


def test_no_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        plan_packs([], 1, 64)


@given(lengths=lengths_of, ranks=st.integers(1, 4))
def test_shares_name_the_same_sequences_as_the_plan(lengths: list[int], ranks: int) -> None:
    plan = plan_packs(lengths, ranks, 400)
    for rank, micro_batches in enumerate(micro_batch_plans(plan)):
        renamed = tuple(tuple(micro_batches.rows[place] for place in pack) for pack in micro_batches.packs)
        assert renamed == plan.packs[rank]
        assert micro_batches.num_tokens == plan.num_tokens


@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=12), size=st.integers(1, 6))
def test_context_parallel_ranks_share_every_sequence_equally(pieces: list[int], size: int) -> None:
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + 2 * size * piece)
    held = [local_tokens(bounds, ContextRank(rank, size)) for rank in range(size)]
    assert sorted(int(token) for tokens in held for token in tokens) == list(range(bounds[-1]))
    for start, stop in itertools.pairwise(bounds):
        of_sequence = [tokens[(tokens >= start) & (tokens < stop)] for tokens in held]
        assert {len(tokens) for tokens in of_sequence} == {(stop - start) // size}
        attended = {int((tokens - start + 1).sum()) for tokens in of_sequence}  # pairs of query and key
        assert len(attended) == 1


@given(lengths=lengths_of, pad=st.sampled_from([2, 4, 8]))
def test_padded_sequences_fit_into_their_packs(lengths: list[int], pad: int) -> None:
    plan = plan_packs(lengths, 2, 400, align=pad, pad=pad)
    assert plan.num_tokens % pad == 0
    for pack in (pack for rank in plan.packs for pack in rank):
        assert sum(-(-lengths[row] // pad) * pad for row in pack) <= plan.num_tokens
