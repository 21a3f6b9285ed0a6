"""Weights against the mismatch of the engine that sampled and the actor that trains.

Both hold the same weights, but their kernels and precisions differ, so the sampled tokens come from a slightly other
distribution than the one that the gradient assumes. With w = p_actor / p_rollout of the sampled token:

tis: truncated importance sampling, min(w, cap) (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
RL Training"). icepop: w within [1 / cap, cap] and 0 beyond, so that tokens on which the two disagree are left out
("Small Leak Can Sink a Great Ship: Boost RL Training on MoE with IcePop").
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MismatchCorrection = Literal["off", "tis", "icepop"]

MAX_LOG_RATIO = 20.0  # keeps infinities out


class MismatchWeights(NamedTuple):
    weights: Tensor  # factors of the token losses, without a gradient
    affected: Tensor  # bool: truncated (tis) or masked (icepop)


def mismatch_weights(
    actor_logprobs: Tensor, rollout_logprobs: Tensor, correction: MismatchCorrection, cap: float
) -> MismatchWeights:
    """Weights per token, of the shape of the log-probabilities (any, the same for both).

    Raises ValueError for an unknown correction, for a cap that is not positive, and for icepop with a cap below 1,
    which would mask every token.
    """
    if cap <= 0 or (correction == "icepop" and cap < 1):
        raise ValueError(f"the cap of {correction} is out of range: {cap}")
    log_ratio = actor_logprobs.detach() - rollout_logprobs.detach()
    ratio = torch.exp(torch.clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if correction == "off":
        return MismatchWeights(torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool))
    if correction == "tis":
        return MismatchWeights(torch.clamp(ratio, max=cap), ratio > cap)
    if correction == "icepop":
        masked = (ratio < 1.0 / cap) | (ratio > cap)
        return MismatchWeights(ratio.masked_fill(masked, 0.0), masked)
    raise ValueError(f"unknown mismatch correction {correction!r}")
