"""Group-relative advantages: the formula, its invariances, and exact zeros where a group says nothing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.advantages import group_advantages

REWARDS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=16)
BINARY = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)


def test_worked_example() -> None:
    # mean 1/4, std with ddof=1 1/2
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.0]), np.array([0.75, -0.25, -0.25, -0.25]) / 0.500001)


@given(BINARY)
def test_the_formula_of_the_published_code(rewards: list[float]) -> None:
    values = torch.tensor(rewards)
    expected = (values - values.mean()) / (values.std() + 1e-6)
    np.testing.assert_allclose(group_advantages(np.float32(rewards)), expected.numpy(), rtol=1e-5, atol=1e-6)


@given(st.floats(-1e6, 1e6), st.integers(1, 16), st.sampled_from([np.float32, np.float64]))
def test_equal_rewards_give_exact_zeros(reward: float, size: int, dtype: type) -> None:
    assert not group_advantages(np.full(size, reward, dtype=dtype)).any()


@given(st.floats(0.1, 100), st.integers(2, 16), st.randoms(use_true_random=False))
def test_rewards_that_differ_by_rounding_alone_give_exact_zeros(reward: float, size: int, rng: random.Random) -> None:
    steps = [rng.randint(-2, 2) for _ in range(size)]
    noisy = np.float32(reward) * (1 + np.array(steps) * np.finfo(np.float32).eps)
    assert not group_advantages(noisy.astype(np.float32)).any()


def test_small_but_real_differences_are_kept() -> None:
    assert group_advantages([1.0, 1.0 + 1e-4]) == pytest.approx([-0.6972, 0.6972], abs=1e-3)
    assert group_advantages(np.float64([1e-9, 2e-9])).any()


@given(REWARDS)
def test_advantages_sum_to_zero(rewards: list[float]) -> None:
    assert group_advantages(rewards).sum() == pytest.approx(0, abs=1e-6)


@given(BINARY, st.floats(-5, 5))
def test_a_shift_of_all_rewards_changes_nothing(rewards: list[float], shift: float) -> None:
    np.testing.assert_allclose(
        group_advantages(np.array(rewards) + shift), group_advantages(rewards), rtol=1e-6, atol=1e-9
    )


@given(BINARY, st.floats(0.5, 100))
def test_a_positive_scale_changes_next_to_nothing(rewards: list[float], scale: float) -> None:
    np.testing.assert_allclose(group_advantages(np.array(rewards) * scale), group_advantages(rewards), rtol=1e-4)


@given(REWARDS, st.randoms(use_true_random=False))
def test_advantages_follow_their_rollouts(rewards: list[float], rng: random.Random) -> None:
    order = list(range(len(rewards)))
    rng.shuffle(order)
    np.testing.assert_allclose(
        group_advantages(np.array(rewards)[order]), group_advantages(rewards)[order], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (np.float32([0, 1]), np.float32),
        (np.float64([0, 1]), np.float64),
        ([0, 1], np.float64),
        ([0.0, 1.0], np.float64),
    ],
)
def test_the_dtype_is_that_of_the_rewards(given: object, returned: type) -> None:
    assert group_advantages(given).dtype == returned  # type: ignore[arg-type]


def test_a_group_of_one_or_none_has_nothing_to_compare_with() -> None:
    np.testing.assert_array_equal(group_advantages([3.0]), [0.0])
    assert group_advantages([]).shape == (0,)


@pytest.mark.parametrize("rewards", [[0.0, float("nan")], [0.0, float("inf")], [[0.0, 1.0]]])
def test_rewards_without_a_meaning_are_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="one-dimensional and finite"):
        group_advantages(rewards)


def test_without_the_standard_deviation_they_are_the_distances_from_the_mean() -> None:
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 1.0, 1.0], by_std=False), [0.4, -0.6, -0.6, 0.4, 0.4])
    np.testing.assert_array_equal(group_advantages([0.3, 0.3], by_std=False), [0, 0])
