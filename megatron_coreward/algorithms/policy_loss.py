"""The clipped policy gradient loss, token by token.

PPO clip (arXiv 1707.06347, Eq. 7) with separate bounds below and above (clip-higher, DAPO, arXiv 2503.14476) and an
optional dual clip (arXiv 1912.09729, Eq. 5).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # a ratio of 5e8, far beyond what says anything; keeps infinities out


class PolicyLoss(NamedTuple):
    """All of the broadcast shape of the inputs."""

    loss: Tensor  # to be minimised
    ratio: Tensor  # new over old probability, without a gradient
    clipped: Tensor  # bool: the bound on the ratio is in force, so the token has no gradient
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
    ratio = torch.exp(torch.clamp(logprobs - old, -MAX_LOG_RATIO, MAX_LOG_RATIO))
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
