"""The loss of a pack: the clipped policy gradient with a KL term, an entropy bonus and the correction for
train/inference mismatch, summed with weights."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_coreward.actor.microbatch import Pack
from megatron_coreward.actor.token_stats import Scores
from megatron_coreward.algorithms.kl import kl_penalty
from megatron_coreward.algorithms.mismatch import mismatch_weights
from megatron_coreward.algorithms.policy_loss import (
    PolicyLoss,
    clipped_weight_loss,
    policy_loss,
    sequence_log_ratios,
    sequence_policy_loss,
)
from megatron_coreward.config.schema import LossSettings
from megatron_coreward.types import FloatArray, TrainBatch


def _gather(pack: Pack, ragged: Sequence[FloatArray], device: torch.device) -> torch.Tensor:
    """[n] the per-token values of the response tokens that this rank scores, in pack order."""
    values = [ragged[row] for row in pack.rows]
    whole = torch.from_numpy(np.concatenate(values) if values else np.zeros(0, np.float32)).to(device)
    return whole if pack.scored is None else whole[pack.scored]


def _policy_terms(
    logprobs: torch.Tensor,
    old: torch.Tensor | None,
    advantages: torch.Tensor,
    pack: Pack,
    settings: LossSettings,
    sum_over_context: Callable[[torch.Tensor], torch.Tensor],
) -> PolicyLoss:
    """[n] the loss of the configured objective."""
    bounds = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    if settings.objective == "cispo":
        return clipped_weight_loss(logprobs, old, advantages, **bounds)
    if settings.objective == "gspo":
        lengths = torch.tensor(pack.response_lengths, dtype=torch.float32, device=logprobs.device)
        sums = torch.zeros_like(lengths)
        if old is not None:
            # A rank has some of a sequence's tokens under context parallelism; the ratio is of all of them.
            sums = sum_over_context(sums.index_add(0, pack.row_of, logprobs.detach() - old))
        return sequence_policy_loss(logprobs, sequence_log_ratios(sums, lengths)[pack.row_of], advantages, **bounds)
    return policy_loss(logprobs, old, advantages, dual_clip=settings.dual_clip, **bounds)


def pack_loss(
    scores: Scores,
    pack: Pack,
    batch: TrainBatch,
    settings: LossSettings,
    sum_over_context: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The pack's part of the batch's loss, and sums of what is worth watching (over tokens, not averaged).

    Args:
        scores: of the pack's N response tokens under the policy being trained; the entropy with a gradient, if the
            settings give it a bonus.
        batch: the rank's share; `pack.rows` index into it.
        sum_over_context: adds up tensors of the context-parallel ranks, which have the same rows.
    """
    logprobs = scores.logprobs
    device = logprobs.device
    rows = torch.tensor(pack.rows, dtype=torch.long, device=device)[pack.row_of]  # [N]
    advantages = torch.from_numpy(batch.advantages).to(device)[rows]
    weights = torch.from_numpy(batch.token_weights).to(device)[rows]
    old = None if batch.old_logprobs is None else _gather(pack, batch.old_logprobs, device)

    terms = _policy_terms(logprobs, old, advantages, pack, settings, sum_over_context)
    per_token = terms.loss
    sums = {
        "tokens": torch.tensor(float(len(rows)), device=device),
        "clipped": (terms.clipped | terms.dual_clipped).float().sum(),
        "entropy": scores.entropy.detach().sum(),
        "self_certainty": scores.self_certainty.sum(),
        "nll": -logprobs.detach().sum(),
    }
    if batch.rollout_logprobs is not None:
        sampled = _gather(pack, batch.rollout_logprobs, device)
        gap = (logprobs.detach() - sampled).abs()
        sums["logprob_gap"] = gap.sum()
        sums["max:logprob_gap"] = gap.max() if len(gap) else gap.sum()
        if settings.mismatch_correction != "off":
            behaviour = logprobs.detach() if old is None else old
            correction = mismatch_weights(behaviour, sampled, settings.mismatch_correction, settings.mismatch_cap)
            per_token = per_token * correction.weights
            sums["mismatch_affected"] = correction.affected.float().sum()
    sums["loss/policy"] = (weights * per_token.detach()).sum()
    if batch.reference_logprobs is not None:
        reference = _gather(pack, batch.reference_logprobs, device)
        kl = kl_penalty(logprobs, reference, settings.kl_estimator, settings.kl_clamp)
        sums["kl"] = kl.detach().sum()
        per_token = per_token + batch.kl_coef * kl
    if settings.entropy_coef:
        per_token = per_token - settings.entropy_coef * scores.entropy
    loss = (weights * per_token).sum()
    sums["loss/total"] = loss.detach()
    return loss, sums
