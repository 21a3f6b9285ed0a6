"""One weight a sequence reproduces every aggregation, however the batch is cut."""

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.aggregation import Aggregation, token_weights, token_weights_by_view
from megatron_coreward.config.schema import LossSettings
from megatron_coreward.types import View

MAX_TOKENS = 20
MODES = get_args(Aggregation)
LOSSES = st.lists(st.lists(st.floats(-10, 10), max_size=MAX_TOKENS).map(np.array), min_size=1, max_size=8)

DIRECT: dict[str, Callable[[Sequence[np.ndarray]], float]] = {
    "token-mean": lambda losses: np.concatenate(losses).mean() if any(map(len, losses)) else 0.0,
    "seq-mean-token-sum": lambda losses: np.mean([loss.sum() for loss in losses]),
    "seq-mean-token-mean": lambda losses: np.mean([loss.mean() if len(loss) else 0.0 for loss in losses]),
    "constant": lambda losses: np.mean([loss.sum() / MAX_TOKENS for loss in losses]),
}


VIEWS: tuple[View, ...] = ("original", "rephrased")


@pytest.mark.parametrize("mode", MODES)
@given(losses=LOSSES, split=st.integers(0, 255))
def test_weights_by_view_give_the_sum_of_each_views_own_aggregation(
    mode: Aggregation, losses: list[np.ndarray], split: int
) -> None:
    views = [VIEWS[split >> place & 1] for place in range(len(losses))]
    weights = token_weights_by_view([len(loss) for loss in losses], views, mode, MAX_TOKENS)
    total = sum(weight * loss.sum() for weight, loss in zip(weights, losses, strict=True))
    parts = ([loss for loss, own in zip(losses, views, strict=True) if own == view] for view in set(views))
    assert total == pytest.approx(sum(DIRECT[mode](part) for part in parts), rel=1e-4, abs=1e-4)


def test_the_modes_are_those_of_the_configuration() -> None:
    assert set(MODES) == set(DIRECT) == set(get_args(LossSettings.model_fields["aggregation"].annotation))


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("token-mean", [1 / 4, 1 / 4, 0]),
        ("seq-mean-token-sum", [1 / 3, 1 / 3, 0]),
        ("seq-mean-token-mean", [1 / 3, 1 / 9, 0]),
        ("constant", [1 / 30, 1 / 30, 0]),
    ],
)
def test_worked_example(mode: Aggregation, weights: list[float]) -> None:
    result = token_weights([1, 3, 0], mode, 10)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, weights, rtol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@given(losses=LOSSES, cuts=st.lists(st.integers(0, 8), max_size=3))
def test_weighted_sums_over_any_cut_are_the_aggregated_loss(
    mode: Aggregation, losses: list[np.ndarray], cuts: list[int]
) -> None:
    weights = token_weights([len(loss) for loss in losses], mode, MAX_TOKENS)
    parts = np.split(np.arange(len(losses)), sorted(min(cut, len(losses)) for cut in cuts))
    total = sum(sum(float(weights[s]) * losses[s].sum() for s in part) for part in parts)
    assert total == pytest.approx(DIRECT[mode](losses), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_empty_responses_and_an_empty_batch_weigh_nothing(mode: Aggregation) -> None:
    np.testing.assert_array_equal(token_weights([0, 0], mode, MAX_TOKENS), [0, 0])
    assert token_weights([], mode, MAX_TOKENS).shape == (0,)


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        token_weights([1, -1], "token-mean", MAX_TOKENS)
    with pytest.raises(ValueError, match="at least 1"):
        token_weights([1], "constant", 0)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        token_weights([1], "mean", MAX_TOKENS)  # type: ignore[arg-type]
