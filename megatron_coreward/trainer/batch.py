"""From rollouts to what the actors take: pure rearrangement, no Ray, no Megatron."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_coreward.algorithms.aggregation import token_weights_by_view
from megatron_coreward.config.schema import LossSettings
from megatron_coreward.types import FloatArray, RolloutGroup, Sequences, TokenStats, TrainBatch, cut


def to_sequences(groups: Sequence[RolloutGroup]) -> Sequences:
    """Prompt and response of every completion, group after group: [S]. The experts that engines chose come along if
    all completions have them."""
    pairs = [(group.prompt.token_ids, c.token_ids) for group in groups for c in group.completions]
    prompts = np.asarray([len(prompt) for prompt, _ in pairs], dtype=np.int32)
    responses = np.asarray([len(response) for _, response in pairs], dtype=np.int64)
    joined = np.concatenate([part for pair in pairs for part in pair], dtype=np.int32)
    routed = [c.routed_experts for group in groups for c in group.completions]
    experts = [of_one for of_one in routed if of_one is not None]
    return Sequences(cut(joined, prompts + responses), prompts, experts if len(experts) == len(pairs) else None)


def to_batch(
    sequences: Sequences,
    groups: Sequence[RolloutGroup],
    advantages: Sequence[FloatArray],
    loss: LossSettings,
    max_response_tokens: int,
    old: TokenStats | None,
    reference: TokenStats | None,
    kl_coef: float,
) -> TrainBatch:
    """All sequences of a step with their advantages, weighed over the whole batch.

    Args:
        sequences: those of the groups (`to_sequences`).
        advantages: [G] of each group.
        old, reference: statistics of the same sequences, if the loss needs them.
    """
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    return TrainBatch(
        sequences=sequences,
        advantages=np.concatenate(advantages).astype(np.float32),
        token_weights=_weights(lengths, groups, loss, max_response_tokens),
        rollout_logprobs=[c.logprobs for c in completions],
        old_logprobs=None if old is None else old.logprobs,
        reference_logprobs=None if reference is None else reference.logprobs,
        kl_coef=kl_coef,
    )


def mini_batches(
    batch: TrainBatch, groups: Sequence[RolloutGroup], loss: LossSettings, max_response_tokens: int
) -> list[TrainBatch]:
    """The batch cut into `updates_per_batch` parts of whole groups, each weighed as a batch of its own."""
    if loss.updates_per_batch == 1:
        return [batch]
    sizes = [len(group.completions) for group in groups]
    ends = np.cumsum([0, *sizes])
    parts = []
    for piece in np.array_split(np.arange(len(groups)), loss.updates_per_batch):
        part = batch.select(range(int(ends[piece[0]]), int(ends[piece[-1] + 1])))
        lengths = [
            total - int(prompt)
            for total, prompt in zip(part.sequences.lengths, part.sequences.prompt_lengths, strict=True)
        ]
        weights = _weights(lengths, [groups[i] for i in piece], loss, max_response_tokens)
        parts.append(replace(part, token_weights=weights))
    return parts


def _weights(
    lengths: Sequence[int], groups: Sequence[RolloutGroup], loss: LossSettings, max_response_tokens: int
) -> FloatArray:
    """[S] weights of the tokens of each sequence of the groups: 0 for those that are left out of the loss, and for the
    others as if these were not there."""
    completions = [completion for group in groups for completion in group.completions]
    kept = [i for i, c in enumerate(completions) if not (loss.mask_truncated and c.finish_reason == "length")]
    views = [group.view for group in groups for _ in group.completions]
    weights = np.zeros(len(lengths), dtype=np.float32)
    weights[kept] = token_weights_by_view(
        [lengths[i] for i in kept],
        [views[i] if loss.views == "sum" else "original" for i in kept],
        loss.aggregation,
        max_response_tokens,
    )
    return weights
