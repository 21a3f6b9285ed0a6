"""The clipped loss: its values by hand, its gradient by finite differences, its limits by sign of the advantage."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_coreward.algorithms.policy_loss import (
    clipped_weight_loss,
    policy_loss,
    sequence_log_ratios,
    sequence_policy_loss,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # 1 + clip_high = 1.3
        (0.5, 2.0, -1.0, False),  # a good token that became rarer is pulled back in full
        (1.5, -2.0, 3.0, False),  # a bad token that became more frequent is pushed down in full
        (0.5, -2.0, 1.6, True),  # 1 - clip_low = 0.8
        (0.9, -2.0, 1.8, False),
        (3.0, 0.0, 0.0, False),
    ],
)
def test_worked_values(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    result = policy_loss(f64(math.log(ratio)), f64(0.0), f64(advantage), clip_low=0.2, clip_high=0.3)
    assert result.loss.item() == pytest.approx(loss)
    assert result.ratio.item() == pytest.approx(ratio)
    assert result.clipped.item() is clipped
    assert result.dual_clipped.item() is False


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "dual"),
    [(5.0, -2.0, 6.0, True), (2.0, -2.0, 4.0, False), (5.0, 2.0, -2.4, False), (0.1, -2.0, 1.6, False)],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens_only(ratio: float, advantage: float, loss: float, dual: bool) -> None:
    logprobs = f64(math.log(ratio)).requires_grad_()
    result = policy_loss(logprobs, f64(0.0), f64(advantage), 0.2, 0.2, dual_clip=3.0)
    assert result.loss.item() == pytest.approx(loss)
    assert result.dual_clipped.item() is dual
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    assert (gradient.item() == 0) is (dual or result.clipped.item())


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_is_the_policy_gradient() -> None:
    logprobs = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(7, dtype=torch.float64)
    result = policy_loss(logprobs, None, advantages, 0.2, 0.2, dual_clip=3.0)
    torch.testing.assert_close(result.loss, -advantages)
    torch.testing.assert_close(result.ratio, torch.ones_like(advantages))
    assert not result.clipped.any()
    assert not result.dual_clipped.any()
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    (plain,) = torch.autograd.grad((-advantages * logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, plain)


def test_without_old_logprobs_is_the_same_as_with_equal_ones() -> None:
    logprobs = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(policy_loss(logprobs, old, advantages, 0.2, 0.2).loss.sum(), logprobs)[0]
        for old in (None, logprobs.detach().clone())
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


@given(st.lists(st.tuples(st.floats(-1.5, 1.5), st.floats(-3, 3)), min_size=1, max_size=6), st.none() | st.just(2.5))
def test_gradients_are_those_of_finite_differences(tokens: list[tuple[float, float]], dual_clip: float | None) -> None:
    kinks = [math.log(0.8), math.log(1.3), math.log(2.5)]
    smooth = [(gap, advantage) for gap, advantage in tokens if all(abs(gap - kink) > 1e-3 for kink in kinks)]
    gaps, advantages = f64(*(gap for gap, _ in smooth)), f64(*(advantage for _, advantage in smooth))
    old = torch.linspace(-3, -1, len(smooth), dtype=torch.float64)
    logprobs = (old + gaps).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, 0.2, 0.3, dual_clip).loss, logprobs)


@given(st.floats(-2, 2), st.floats(-3, -0.1) | st.just(0.0) | st.floats(0.1, 3))
def test_indicators_say_where_the_gradient_is_gone(gap: float, advantage: float) -> None:
    logprobs = f64(gap).requires_grad_()
    result = policy_loss(logprobs, f64(0.0), f64(advantage), 0.2, 0.2, dual_clip=2.0)
    (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
    assert (gradient.item() == 0) is bool(result.clipped or result.dual_clipped or advantage == 0)


def test_any_shapes_that_broadcast() -> None:
    logprobs = torch.zeros(3, 5)
    result = policy_loss(logprobs, torch.zeros(3, 5), torch.ones(3, 1), 0.2, 0.2, 3.0)
    assert {tensor.shape for tensor in result} == {torch.Size([3, 5])}
    assert policy_loss(torch.zeros(0), None, torch.zeros(0), 0.2, 0.2).loss.shape == (0,)


def test_old_logprobs_and_ratio_carry_no_gradient() -> None:
    old = torch.zeros(2, requires_grad=True)
    result = policy_loss(torch.zeros(2, requires_grad=True), old, torch.ones(2), 0.2, 0.2)
    result.loss.sum().backward()
    assert old.grad is None
    assert not result.ratio.requires_grad


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_absurd_ratios_stay_finite(gap: float) -> None:
    logprobs = torch.tensor([gap], requires_grad=True)
    loss = policy_loss(logprobs, torch.zeros(1), torch.tensor([-1.0]), 0.2, 0.2).loss.sum()
    loss.backward()
    assert logprobs.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()


class TestGspo:
    """One ratio for a sequence: the geometric mean of those of its tokens."""

    def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens_ratios(self) -> None:
        log_ratios = f64(math.log(2.0), math.log(0.5), math.log(8.0), math.log(1.5))  # of sequences of 3 and 1 tokens
        sums = torch.stack([log_ratios[:3].sum(), log_ratios[3]])
        found = sequence_log_ratios(sums, f64(3, 1)).exp()
        torch.testing.assert_close(found, f64(2.0, 1.5))
        assert sequence_log_ratios(f64(0.0), f64(0.0)).item() == 0  # a response of no tokens

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "clipped"),
        [(1.1, 2.0, -2.2, False), (1.5, 2.0, -2.6, True), (0.5, -2.0, 1.6, True), (1.5, -2.0, 3.0, False)],
    )
    def test_all_tokens_of_a_sequence_are_clipped_together(
        self, ratio: float, advantage: float, loss: float, clipped: bool
    ) -> None:
        log_ratio = f64(math.log(ratio))
        result = sequence_policy_loss(f64(-1.0, -7.0), log_ratio, f64(advantage), clip_low=0.2, clip_high=0.3)
        torch.testing.assert_close(result.loss, f64(loss, loss))
        assert result.clipped.tolist() == [clipped, clipped]

    @pytest.mark.parametrize("advantage", [1.5, -0.5])
    def test_the_mean_over_a_sequence_has_the_gradient_of_the_sequences_own_loss(self, advantage: float) -> None:
        old = f64(-1.0, -2.0, -0.5)
        logprobs = (old + f64(0.05, -0.2, 0.1)).requires_grad_()

        def of_sequence(x: Tensor) -> Tensor:  # Eq. 5 and 7 of the paper, for one sequence
            s = (x - old).mean().exp()
            return torch.maximum(-s * advantage, -s.clamp(0.8, 1.2) * advantage)

        assert torch.autograd.gradcheck(of_sequence, logprobs)
        (expected,) = torch.autograd.grad(of_sequence(logprobs), logprobs)
        mean = sequence_log_ratios((logprobs.detach() - old).sum(), f64(3.0))
        result = sequence_policy_loss(logprobs, mean, f64(advantage), 0.2, 0.2)
        assert result.loss.mean().item() == pytest.approx(of_sequence(logprobs).item())
        (found,) = torch.autograd.grad(result.loss.mean(), logprobs)
        torch.testing.assert_close(found, expected)


class TestCispo:
    """The weight of a token is bounded, and no token loses its gradient."""

    @pytest.mark.parametrize(
        ("ratio", "weight", "clipped"), [(1.0, 1.0, False), (1.5, 1.3, True), (0.5, 0.8, True), (1.2, 1.2, False)]
    )
    @pytest.mark.parametrize("advantage", [2.0, -2.0])
    def test_worked_values(self, ratio: float, weight: float, clipped: bool, advantage: float) -> None:
        logprobs = f64(-0.5).requires_grad_()
        result = clipped_weight_loss(logprobs, f64(-0.5 - math.log(ratio)), f64(advantage), 0.2, 0.3)
        assert result.loss.item() == pytest.approx(0.5 * weight * advantage)
        assert result.ratio.item() == pytest.approx(ratio)
        assert result.clipped.item() is clipped
        (gradient,) = torch.autograd.grad(result.loss.sum(), logprobs)
        assert gradient.item() == pytest.approx(-weight * advantage)

    def test_without_old_logprobs_the_gradient_is_the_policy_gradient(self) -> None:
        logprobs = torch.randn(7, dtype=torch.float64, requires_grad=True)
        advantages = torch.randn(7, dtype=torch.float64)
        (found,) = torch.autograd.grad(clipped_weight_loss(logprobs, None, advantages, 0.2, 0.2).loss.sum(), logprobs)
        torch.testing.assert_close(found, -advantages)

    @pytest.mark.parametrize("gap", [-1e4, 1e4])
    def test_absurd_ratios_stay_finite(self, gap: float) -> None:
        logprobs = torch.tensor([gap], requires_grad=True)
        loss = clipped_weight_loss(logprobs, torch.zeros(1), torch.tensor([-1.0]), 0.2, 0.2).loss.sum()
        loss.backward()
        assert torch.isfinite(loss)
