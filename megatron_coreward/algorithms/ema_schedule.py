"""The teacher's decay over training (arXiv 2508.00410, Eq. 11; as its text and published code have it)."""

import math


def teacher_decay(step: int, total_steps: int, start: float, end: float) -> float:
    """Decay d of `teacher <- d * teacher + (1 - d) * policy` at `step` k of K `total_steps`.

    d(k) = end - 0.5 * (end - start) * (1 + cos(pi * k / K)): `start` at k = 0, `end` at k = K, a half cosine between.
    Steps beyond K count as K; a run that is prolonged has another K. Raises ValueError for a negative step, for
    K < 1 and for decays outside 0..1.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"need step >= 0 and total_steps >= 1, got {step} and {total_steps}")
    if not (0.0 <= start <= 1.0 and 0.0 <= end <= 1.0):
        raise ValueError(f"decays must lie in 0..1, got start {start} and end {end}")
    return end - 0.5 * (end - start) * (1.0 + math.cos(math.pi * min(step, total_steps) / total_steps))
