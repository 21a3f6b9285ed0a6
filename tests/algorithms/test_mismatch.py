"""Weights against the mismatch of engine and actor: what is kept, what is cut, what is left out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.mismatch import MismatchCorrection, mismatch_weights

RATIOS = [0.1, 0.4, 0.5, 1.0, 2.0, 2.5, 100.0]
ACTOR = torch.tensor([math.log(ratio) for ratio in RATIOS], dtype=torch.float64) - 3.0
ROLLOUT = torch.full_like(ACTOR, -3.0)


@pytest.mark.parametrize(
    ("correction", "weights", "affected"),
    [
        ("off", [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]),
        ("tis", [0.1, 0.4, 0.5, 1.0, 2.0, 2.1, 2.1], [0, 0, 0, 0, 0, 1, 1]),
        ("icepop", [0, 0, 0.5, 1.0, 2.0, 0, 0], [1, 1, 0, 0, 0, 1, 1]),
    ],
)
def test_worked_values(correction: MismatchCorrection, weights: list[float], affected: list[int]) -> None:
    result = mismatch_weights(ACTOR, ROLLOUT, correction, cap=2.1)
    torch.testing.assert_close(result.weights, torch.tensor(weights, dtype=torch.float64))
    assert result.affected.tolist() == [bool(value) for value in affected]


@given(st.floats(-5, 5), st.floats(1, 10), st.sampled_from(["tis", "icepop"]))
def test_weights_never_exceed_the_cap(gap: float, cap: float, correction: MismatchCorrection) -> None:
    weight = mismatch_weights(torch.tensor([gap], dtype=torch.float64), torch.zeros(1), correction, cap).weights.item()
    assert 0 <= weight <= cap


@pytest.mark.parametrize("correction", ["off", "tis", "icepop"])
def test_equal_logprobs_weigh_one(correction: MismatchCorrection) -> None:
    result = mismatch_weights(ACTOR, ACTOR, correction, cap=2.0)
    torch.testing.assert_close(result.weights, torch.ones_like(ACTOR))
    assert not result.affected.any()


@pytest.mark.parametrize("correction", ["off", "tis", "icepop"])
def test_weights_carry_no_gradient_and_stay_finite(correction: MismatchCorrection) -> None:
    actor = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    weights = mismatch_weights(actor, torch.zeros(3), correction, cap=2.0).weights
    assert not weights.requires_grad
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize(("correction", "cap"), [("tis", 0.0), ("off", -1.0), ("icepop", 0.9)])
def test_caps_that_make_no_sense_are_refused(correction: MismatchCorrection, cap: float) -> None:
    with pytest.raises(ValueError, match="cap"):
        mismatch_weights(ACTOR, ROLLOUT, correction, cap)


def test_an_unknown_correction_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown mismatch correction 'is'"):
        mismatch_weights(ACTOR, ROLLOUT, "is", 2.0)  # type: ignore[arg-type]
