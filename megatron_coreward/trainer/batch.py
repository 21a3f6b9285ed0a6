"""From rollouts to what the actors take: pure rearrangement, no Ray, no Megatron."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_coreward.algorithms.aggregation import token_weights
from megatron_coreward.config.schema import LossSettings
from megatron_coreward.types import FloatArray, RolloutGroup, Sequences, TokenStats, TrainBatch


def to_sequences(groups: Sequence[RolloutGroup]) -> Sequences:
    """Prompt and response of every completion, group after group: [S]."""
    completions = [(group.prompt, completion) for group in groups for completion in group.completions]
    return Sequences(
        [np.concatenate([prompt.token_ids, c.token_ids]).astype(np.int32) for prompt, c in completions],
        np.asarray([len(prompt.token_ids) for prompt, _ in completions], dtype=np.int32),
    )


def to_batch(
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
        advantages: [G] of each group.
        old, reference: statistics of the same sequences, where the loss needs them.
    """
    completions = [completion for group in groups for completion in group.completions]
    return TrainBatch(
        sequences=to_sequences(groups),
        advantages=np.concatenate(advantages).astype(np.float32),
        token_weights=token_weights([len(c.token_ids) for c in completions], loss.aggregation, max_response_tokens),
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
        weights = token_weights(lengths, loss.aggregation, max_response_tokens)
        parts.append(replace(part, token_weights=weights))
    return parts
