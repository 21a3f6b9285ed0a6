"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL divergence").

With d = log p_reference - log p_policy of the sampled token:

k1 = -d: unbiased, high variance, of either sign. Its gradient as a loss has mean zero: it pulls nowhere.
k2 = d^2 / 2: biased, never negative. Its gradient is an unbiased one of the KL divergence.
k3 = exp(d) - d - 1: unbiased, never negative (GRPO, arXiv 2402.03300, Eq. 4).
"""

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0  # keeps infinities out


def kl_penalty(
    logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator, clamp: float | None = None
) -> Tensor:
    """Estimates per token, in nats, differentiable in `logprobs`; the reference is a constant.

    Guard of k3: exp(d) of a token that the policy has almost ruled out would be infinite, so d is held within +-20
    inside k3, and the token then has no gradient. `clamp` holds k3 itself at that bound besides, as published
    implementations do at 10, and so takes the gradient from tokens beyond it: the penalty is off where it is needed
    most. Raises ValueError for an unknown estimator.
    """
    d = reference_logprobs.detach() - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        d = torch.clamp(d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        k3 = torch.expm1(d) - d
        return k3 if clamp is None else torch.clamp(k3, max=clamp)
    raise ValueError(f"unknown KL estimator {estimator!r}")
