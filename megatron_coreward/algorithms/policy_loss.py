"""The policy gradient loss, token by token, under one of three objectives.

ppo: PPO clip (arXiv 1707.06347, Eq. 7) with separate bounds below and above (clip-higher, DAPO, arXiv 2503.14476) and
an optional dual clip (arXiv 1912.09729, Eq. 5). gspo: the same clip on one ratio for a whole sequence (arXiv
2507.18071). cispo: bounds on the weight of a token and not on its gradient (MiniMax-M1, arXiv 2506.13585).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # a ratio of 5e8, far beyond what says anything; keeps infinities out


class PolicyLoss(NamedTuple):
    """All of the broadcast shape of the inputs."""

    loss: Tensor  # to be minimised
    ratio: Tensor  # new over old probability, without a gradient
    clipped: Tensor  # bool: the bound on the ratio is in force; under ppo and gspo the token then has no gradient
    dual_clipped: Tensor  # bool: the bound on the loss of a negative advantage is in force, likewise


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Loss `max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high))` with r = exp(logprobs - old_logprobs).

    The three tensors have any shapes that broadcast, for instance [T], [T] and [T] or [S, L], [S, L] and [S, 1].
    Without `old_logprobs` the current policy is the old one: r is 1 in value and the gradient is that of -A log p.
    With `dual_clip` c > 1 the loss of a token with A < 0 is at most -c A, however far its ratio has grown. Log ratios
    beyond +-20 are held there, and have no gradient.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    return _clipped_loss(logprobs - old, advantages, clip_low, clip_high, dual_clip)


def sequence_policy_loss(
    logprobs: Tensor, sequence_log_ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """GSPO: the loss of `policy_loss` with one ratio s = exp(mean over a sequence of logprobs - old_logprobs) for all
    tokens of the sequence, so that they are clipped together.

    The gradient of a token is that of -A s log p: the mean over a sequence of these losses has the gradient of
    `-A s` (arXiv 2507.18071, Eq. 10), which is what aggregation seq-mean-token-mean adds up.

    Args:
        sequence_log_ratios: log s of the sequence that each token is in, without a gradient (`sequence_log_ratios`).
    """
    log_ratios = sequence_log_ratios.detach() + (logprobs - logprobs.detach())
    return _clipped_loss(log_ratios, advantages, clip_low, clip_high, None)


def sequence_log_ratios(log_ratio_sums: Tensor, lengths: Tensor) -> Tensor:
    """[R] log s of R sequences: the sum of a whole sequence's log ratios [R] over its response tokens [R]."""
    return log_ratio_sums / lengths.clamp(min=1)


def clipped_weight_loss(
    logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """CISPO: loss `-clamp(r, 1 - clip_low, 1 + clip_high) A log p`, the clamped ratio being a constant.

    Every token keeps a gradient, those beyond the bounds one of bounded weight. The paper leaves the lower bound open,
    which `clip_low` near 1 does.
    """
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    ratio = torch.exp(torch.clamp(logprobs.detach() - old, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weight = torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantages * logprobs
    clipped = (weight != ratio).expand_as(loss)
    return PolicyLoss(loss, ratio.expand_as(loss), clipped, torch.zeros_like(clipped))


def _clipped_loss(
    log_ratios: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> PolicyLoss:
    ratio = torch.exp(torch.clamp(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    free = -advantages * ratio
    bounded = -advantages * torch.clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(free, bounded)
    clipped = bounded > free
    dual_clipped = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > ceiling)
        loss = torch.where(dual_clipped, ceiling, loss)
    return PolicyLoss(loss, ratio.detach().expand_as(loss), clipped, dual_clipped)
