"""Repetition is the share of n-grams that stood in the same response before."""

import numpy as np
import pytest

from megatron_coreward.algorithms.repetition import repeated_ngrams
from megatron_coreward.types import IntArray


def tokens(*ids: int) -> IntArray:
    return np.asarray(ids, dtype=np.int32)


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([tokens(1, 2, 3, 4, 5, 6)], 0),
        ([tokens(7, 7, 7, 7, 7, 7)], 2 / 3),  # three n-grams, all alike
        ([tokens(1, 2, 3, 4, 1, 2, 3, 4)], 1 / 5),  # the last one is the first one
        ([tokens(1, 2, 3, 4), tokens(1, 2, 3, 4)], 0),  # another response is no repetition
        ([tokens(7, 7, 7, 7, 7, 7), tokens(1, 2, 3, 4)], 1 / 3),
        ([tokens(7, 7, 7)], 0),  # too short for any
        ([], 0),
    ],
)
def test_the_share_of_ngrams_that_came_before(responses: list[IntArray], share: float) -> None:
    assert repeated_ngrams(responses) == pytest.approx(share)


def test_it_is_that_of_a_plain_count_on_random_tokens() -> None:
    generator = np.random.default_rng(1)
    responses = [generator.integers(0, 3, size=size).astype(np.int32) for size in (4, 30, 200)]
    shares = []
    for response in responses:
        seen = [tuple(response[i : i + 4].tolist()) for i in range(len(response) - 3)]
        shares.append(1 - len(set(seen)) / len(seen))
    assert repeated_ngrams(responses) == pytest.approx(np.mean(shares))
