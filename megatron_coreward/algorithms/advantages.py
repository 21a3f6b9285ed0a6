"""Group-relative advantages (GRPO, arXiv 2402.03300), as the published implementation computes them.

Invariants: the advantages of a group sum to zero; shifting all rewards changes nothing; a group without variance gets
exact zeros, also if its rewards differ by rounding alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

EPSILON = 1e-6  # added to the standard deviation
# Rewards are single precision at best: a spread of a few units in the last place is rounding, and dividing it by
# (itself + EPSILON) would blow it up to the size of an advantage.
ROUNDING = 8 * float(np.finfo(np.float32).eps)


def group_advantages(rewards: ArrayLike, by_std: bool = True) -> NDArray[np.floating]:
    """[G] rewards of one group -> [G] advantages `(r - mean) / (std + 1e-6)`, std with ddof=1.

    Without `by_std` they are `r - mean`: the spread of a group's rewards then says how much it teaches, and questions
    that are almost always or almost never right weigh no more than others (Dr. GRPO, arXiv 2503.20783, section 3.1).
    Computed in double precision, returned in the dtype of the rewards (float64 for anything that is not floating).
    Zeros if all rewards are equal up to single-precision rounding, and for a group of one. Raises ValueError for
    rewards that are not one-dimensional or not finite.
    """
    given = np.asarray(rewards)
    values = given.astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"rewards of a group must be one-dimensional and finite, got {given!r}")
    dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float64)
    if values.size < 2 or np.ptp(values) <= ROUNDING * np.abs(values).max():
        return np.zeros(values.shape, dtype=dtype)
    scale = values.std(ddof=1) + EPSILON if by_std else 1.0
    advantages: NDArray[np.floating] = ((values - values.mean()) / scale).astype(dtype)
    return advantages
