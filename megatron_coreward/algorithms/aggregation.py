"""How token losses add up to the loss of a batch, written as one weight per sequence.

Invariant: `sum_s w_s * sum_t loss(s, t)` is the aggregated loss. The weights are computed once, from the lengths of the
*whole* batch, so every cut into micro-batches, ranks or packs adds up to the same loss and the same gradient.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.types import FloatArray, View

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]


def token_weights(
    response_lengths: Sequence[int] | NDArray[np.integer], mode: Aggregation, max_response_tokens: int
) -> FloatArray:
    """[S] response lengths in tokens -> [S] weights of their tokens.

    token-mean: the mean over all tokens, 1 / sum(L); seq-mean-token-sum: the mean over sequences of their sums, 1 / S;
    seq-mean-token-mean: the mean over sequences of their means, 1 / (S L_s); constant: the mean over sequences of their
    sums over a fixed length, 1 / (S max_response_tokens), which favours no length (Dr. GRPO, arXiv 2503.20783).
    A response of no tokens counts in S and gets the weight 0. Only `constant` reads `max_response_tokens`. Raises
    ValueError for an unknown mode, for lengths that are negative or not [S], and for a fixed length below 1.
    """
    lengths = np.asarray(response_lengths, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError(f"response lengths must be [S] and not negative, got {lengths}")
    if mode == "constant" and max_response_tokens < 1:
        raise ValueError(f"max_response_tokens must be at least 1, got {max_response_tokens}")
    num_sequences = len(lengths)
    if mode == "token-mean":
        denominators = np.full(num_sequences, lengths.sum())
    elif mode == "seq-mean-token-sum":
        denominators = np.full(num_sequences, num_sequences)
    elif mode == "seq-mean-token-mean":
        denominators = num_sequences * lengths
    elif mode == "constant":
        denominators = np.full(num_sequences, num_sequences * max_response_tokens)
    else:
        raise ValueError(f"unknown aggregation {mode!r}")
    weights = np.zeros(num_sequences)
    np.divide(1.0, denominators, out=weights, where=lengths > 0)
    return weights.astype(np.float32)


def token_weights_by_view(
    response_lengths: Sequence[int], views: Sequence[View], mode: Aggregation, max_response_tokens: int
) -> FloatArray:
    """[S] weights whose loss is the sum of each view's own aggregation; `views`: [S] of each sequence.

    For a batch of one view these are the weights of `token_weights`. Raises ValueError as that does.
    """
    lengths, of_view = np.asarray(response_lengths, dtype=np.int64), np.asarray(views)
    weights = np.zeros(len(lengths), dtype=np.float32)
    for view in dict.fromkeys(views):
        weights[of_view == view] = token_weights(lengths[of_view == view], mode, max_response_tokens)
    return weights
