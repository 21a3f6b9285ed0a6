"""How much a response repeats itself: a policy that is rewarded for agreeing with itself may end in loops."""

from collections.abc import Sequence

import numpy as np

from megatron_coreward.types import IntArray

LENGTH = 4  # tokens


def repeated_ngrams(responses: Sequence[IntArray], length: int = LENGTH) -> float:
    """The share of n-grams that occur earlier in the same response, as a mean over the responses that have any.

    0 if no response repeats one, or if all are shorter than an n-gram.

    Args:
        responses: token ids, [L] each.
        length: tokens of an n-gram.
    """
    factors = np.random.default_rng(0).integers(1, 2**63, size=length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shares = []
    for tokens in responses:
        if len(tokens) < length:
            continue
        ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens).astype(np.uint64), length)
        hashes = ngrams @ factors  # modulo 2**64: to sort numbers is ten times as fast as to sort rows
        shares.append(1 - len(np.unique(hashes)) / len(hashes))
    return float(np.mean(shares)) if shares else 0.0
