"""Estimators against brute force, intervals against coverage, tests against their level."""

from itertools import combinations, product
from math import comb, isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.accuracy import (
    bootstrap,
    compare_paired,
    pass_at_k,
    sample_sizes,
    sampled_scores,
    wilson_interval,
)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    right = [True] * c + [False] * (n - c)
    subsets = [any(chosen) for chosen in combinations(right, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(1000, 3, 100) == pytest.approx(1 - comb(997, 100) / comb(1000, 100))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k <= num_samples"):
        pass_at_k(n, c, k)


def test_scores_of_each_question_by_metric() -> None:
    scores = sampled_scores([[True, False, False, False], [True] * 4], [False, True], [True, False])
    assert list(scores) == ["pass@1", "avg@4", "pass@2", "pass@4", "maj@4"]
    assert {name: list(values) for name, values in scores.items()} == {
        "pass@1": [1, 0],
        "avg@4": [0.25, 1],
        "pass@2": [0.5, 1],
        "pass@4": [1, 1],
        "maj@4": [0, 1],
    }
    assert "pass@1" not in sampled_scores([[True]], [True])


@pytest.mark.parametrize("right", [[], [[]], [[True], [True, False]]])
def test_scores_refuse_ragged_and_missing_samples(right: list[list[bool]]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (numpy's own for ragged lists)
        sampled_scores(right, [True] * len(right))


def test_sizes_of_pass_at_k() -> None:
    assert [sample_sizes(n) for n in (1, 2, 6, 8)] == [[], [2], [2, 4, 6], [2, 4, 8]]


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        estimate = bootstrap(rng.random(120) < 0.4, resamples=500, seed=trial)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.91 < covered / 300 < 0.98


def test_bootstrap_of_the_same_values_is_the_same_and_of_equal_values_a_point() -> None:
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    certain = bootstrap([1.0] * 20)
    assert (certain.value, certain.low, certain.high) == (1, 1, 1)
    assert isnan(bootstrap([]).value)


def test_the_permutation_test_agrees_with_all_sign_flips() -> None:
    a, b = [0, 0, 1, 0, 0, 1, 0, 0.5], [1, 1, 1, 1, 0, 0, 1, 1]
    gaps = np.subtract(b, a)
    flipped = [abs(np.dot(signs, gaps)) >= abs(gaps.sum()) for signs in product((-1, 1), repeat=8)]
    pair = compare_paired(a, b, resamples=40_000)
    assert pair.p_value == pytest.approx(np.mean(flipped), abs=0.01)
    assert pair.difference.value == pytest.approx(gaps.mean())
    assert (pair.num_questions, pair.num_better, pair.num_worse) == (8, 5, 1)


def test_the_permutation_test_keeps_its_level_and_finds_real_differences() -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(200):
        difficulty = rng.random(80)
        a, b = rng.random((2, 80)) < difficulty
        p_values.append(compare_paired(a, b, resamples=400).p_value)
    assert 0.01 < np.mean(np.less(p_values, 0.05)) < 0.1
    better = compare_paired(np.zeros(40), np.r_[np.ones(20), np.zeros(20)])
    assert better.p_value < 0.001
    assert better.difference.low > 0


def test_no_difference_is_no_evidence() -> None:
    pair = compare_paired([0, 1, 1], [0, 1, 1])
    assert pair.p_value == 1
    assert (pair.difference.low, pair.difference.high) == (0, 0)
    with pytest.raises(ValueError, match="same questions"):
        compare_paired([1], [1, 0])


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"), [(8, 10, 0.490, 0.943), (0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0)]
)
def test_wilson_intervals_are_the_textbook_s(right: int, trials: int, low: float, high: float) -> None:
    estimate = wilson_interval(right, trials)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((right / trials, low, high), abs=1e-3)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a trial"):
        wilson_interval(0, 0)
