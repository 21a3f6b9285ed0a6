"""The order of batches keeps its invariants for every size, seed and step."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.data.sampler import BatchOrder, BatchSampler
from megatron_coreward.errors import InputError
from megatron_coreward.types import Problem


@st.composite
def orders(draw: st.DrawFn) -> BatchOrder:
    batch_size = draw(st.integers(1, 12))
    num_problems = draw(st.integers(batch_size, 40))
    return BatchOrder(num_problems, batch_size, draw(st.integers(0, 2**32)), draw(st.booleans()))


@given(order=orders(), epochs=st.integers(1, 15))
def test_every_epoch_is_a_permutation_and_no_batch_repeats_a_problem(order: BatchOrder, epochs: int) -> None:
    num_steps = -(-epochs * order.num_problems // order.batch_size)
    batches = [order.batch(step) for step in range(num_steps)]
    for batch in batches:
        assert len(batch) == len(set(batch)) == order.batch_size
    stream = [position for batch in batches for position in batch]
    for epoch in range(epochs):
        drawn = stream[epoch * order.num_problems : (epoch + 1) * order.num_problems]
        assert sorted(drawn) == list(range(order.num_problems))


@given(order=orders(), steps=st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_a_batch_is_a_function_of_its_step_alone(order: BatchOrder, steps: list[int]) -> None:
    fresh = BatchOrder(order.num_problems, order.batch_size, order.seed, order.shuffle)
    assert [order.batch(step) for step in steps] == [fresh.batch(step) for step in reversed(steps)][::-1]


@given(order=orders().filter(lambda order: not order.shuffle), step=st.integers(0, 300))
def test_without_shuffling_batches_go_round_in_file_order(order: BatchOrder, step: int) -> None:
    start = step * order.batch_size
    assert order.batch(step) == [i % order.num_problems for i in range(start, start + order.batch_size)]


def test_epochs_and_seeds_differ() -> None:
    orders_ = [BatchOrder(100, 10, seed).epoch(epoch).tolist() for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders_}) == 6


def test_an_epoch_that_begins_with_its_own_batch_is_the_plain_permutation_of_seed_and_epoch() -> None:
    for epoch in (0, 1, 7):
        expected = np.random.default_rng((5, epoch)).permutation(24)
        np.testing.assert_array_equal(BatchOrder(24, 8, seed=5).epoch(epoch), expected)


def test_only_what_the_straddling_batch_holds_is_moved_back() -> None:
    order = BatchOrder(10, 8, seed=3)
    held = set(order.epoch(0)[8:].tolist())
    raw = np.random.default_rng((3, 1)).permutation(10).tolist()
    head = [position for position in raw if position not in held][:6]
    assert order.epoch(1).tolist() == head + [position for position in raw if position not in head]


def test_first_places_are_drawn_evenly() -> None:
    """Moving problems back must not favour any: over many seeds each problem leads the second epoch as often."""
    counts = np.zeros(6)
    for seed in range(3000):
        counts[BatchOrder(6, 4, seed).batch(1)[2]] += 1
    assert np.all(np.abs(counts - 500) < 5 * np.sqrt(500))


def test_fewer_problems_than_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match=r"data\.batch_size: found 8, but only 7 problems .*allowed: at most 7"):
        BatchOrder(7, 8, seed=0)


def test_the_sampler_hands_out_the_problems_of_a_step_and_resumes_there() -> None:
    problems = [Problem(f"set/{i}", {}, None, "set") for i in range(10)]
    whole = [BatchSampler(problems, 4, seed=1).batch(step) for step in range(6)]
    resumed = BatchSampler(problems, 4, seed=1)
    assert [resumed.batch(step) for step in range(3, 6)] == whole[3:]
    assert all(first != second for first, second in pairwise(whole))
    assert len({problem.uid for batch in whole[:2] for problem in batch}) == 8
