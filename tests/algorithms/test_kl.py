"""The KL estimators: values, signs, gradients, and what they estimate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.kl import KLEstimator, kl_penalty


@pytest.mark.parametrize(("estimator", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 0.5 - 1)])
def test_worked_values(estimator: KLEstimator, value: float) -> None:
    policy, reference = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    assert kl_penalty(policy, reference, estimator).item() == pytest.approx(value)


@given(st.floats(-15, 15))
def test_k2_and_k3_are_never_negative_and_all_vanish_at_equality(gap: float) -> None:
    policy, reference = torch.tensor([gap], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert kl_penalty(policy, reference, "k2") >= 0
    assert kl_penalty(policy, reference, "k3") >= 0
    for estimator in ("k1", "k2", "k3"):
        assert kl_penalty(policy, policy, estimator) == 0


def test_k3_keeps_its_precision_near_equality_in_float32() -> None:
    gap = 1e-3
    k3 = kl_penalty(torch.tensor([-1.0 - gap]), torch.tensor([-1.0]), "k3")
    assert k3.item() == pytest.approx(gap**2 / 2, rel=0.02)  # exp(d) - d - 1 in single precision would be off by 20%


def test_k3_may_be_held_at_a_bound_and_then_gives_no_gradient_beyond_it() -> None:
    """Both readings of a token that the policy has almost ruled out, against the formula."""
    policy, reference = torch.tensor([-1.0, -5.0], requires_grad=True), torch.tensor([-1.5, -0.5])
    free = [math.exp(d) - d - 1 for d in (-0.5, 4.5)]  # 0.107 and 84.5

    def k3(clamp: float | None) -> tuple[list[float], list[float]]:
        values = kl_penalty(policy, reference, "k3", clamp)
        (gradient,) = torch.autograd.grad(values.sum(), policy)
        return values.tolist(), gradient.tolist()

    values, gradient = k3(None)
    assert values == pytest.approx(free, rel=1e-5)
    assert gradient == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(4.5)], rel=1e-5)
    values, gradient = k3(10.0)
    assert values == pytest.approx([free[0], 10.0], rel=1e-5)
    assert gradient == pytest.approx([1 - math.exp(-0.5), 0.0], rel=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_those_of_finite_differences(estimator: KLEstimator) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, reference, estimator), policy)


def expectation(estimator: KLEstimator, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean of the estimator over all tokens of a small vocabulary, sampled from the policy as it is now."""
    logprobs = logits.log_softmax(-1)
    return (logprobs.exp().detach() * kl_penalty(logprobs, reference, estimator)).sum()


def test_k1_and_k3_are_unbiased_and_the_gradients_are_as_documented() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(11, dtype=torch.float64, generator=generator).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (gradient,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(expectation(estimator, logits, reference), divergence)
    (of_k1,) = torch.autograd.grad(expectation("k1", logits, reference), logits)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1))
    (of_k2,) = torch.autograd.grad(expectation("k2", logits, reference), logits)
    torch.testing.assert_close(of_k2, gradient)


def test_the_reference_is_a_constant() -> None:
    reference = torch.zeros(2, requires_grad=True)
    kl_penalty(torch.ones(2, requires_grad=True), reference, "k3").sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_k3_stays_finite(gap: float) -> None:
    policy = torch.tensor([gap], requires_grad=True)
    value = kl_penalty(policy, torch.zeros(1), "k3").sum()
    value.backward()
    assert policy.grad is not None
    assert torch.isfinite(value)
    assert policy.grad.item() == 0


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]
