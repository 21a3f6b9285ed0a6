"""How accurate a model is, and how sure that is: estimators over samples, intervals over questions, paired tests.

Numbers in, numbers out. Q questions, n samples a question. Intervals and p-values treat the questions as a sample of
all questions of their kind (samples of one question are not independent of each other, so they are averaged first).
Everything random is drawn from a seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions with its interval; all three are NaN without a question."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B - A on the same questions."""

    difference: Estimate
    p_value: float  # two-sided, of the hypothesis that A and B are exchangeable on every question
    num_questions: int
    num_better: int  # questions on which B is better than A
    num_worse: int


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples is right, without bias from n >= k samples (arXiv 2107.03374, eq. 1):
    1 - C(n - c, k) / C(n, k). Raises ValueError unless 0 <= c <= n and 1 <= k <= n."""
    if not (0 <= num_right <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"need 0 <= num_right <= num_samples and 1 <= k <= num_samples: {num_samples=} {num_right=} {k=}"
        )
    if num_samples - num_right < k:
        return 1.0
    wrong = np.arange(num_samples - num_right + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - k / wrong))


def sampled_scores(
    right: Sequence[Sequence[bool]], majority_right: Sequence[bool], greedy_right: Sequence[bool] | None = None
) -> dict[str, Float64Array]:
    """Scores [Q] of each question by metric: `pass@1` (the most likely answer), `avg@n`, `pass@k` for k = 2, 4, ... n,
    and `maj@n`.

    Args:
        right: Q x [n] whether each sample is right; n is the same for all.
        majority_right: [Q] whether the majority answer of the samples is.
        greedy_right: [Q] whether the most likely answer is; None: it was not drawn.

    Raises ValueError if the sizes differ or there is no sample.
    """
    table = np.asarray(right, dtype=bool)
    if table.ndim != 2 or table.shape[1] == 0 or len(majority_right) != len(table):
        raise ValueError(f"need Q x [n] samples and [Q] majorities, got {table.shape} and {len(majority_right)}")
    n = table.shape[1]
    scores: dict[str, Float64Array] = {}
    if greedy_right is not None:
        if len(greedy_right) != len(table):
            raise ValueError(f"{len(table)} questions with samples, {len(greedy_right)} with a most likely answer")
        scores["pass@1"] = np.asarray(greedy_right, dtype=np.float64)
    counts = table.sum(axis=1)
    scores[f"avg@{n}"] = counts / n
    by_count = {k: np.array([pass_at_k(n, c, k) for c in range(n + 1)]) for k in sample_sizes(n)}
    scores |= {f"pass@{k}": chances[counts] for k, chances in by_count.items()}
    scores[f"maj@{n}"] = np.asarray(majority_right, dtype=np.float64)
    return scores


def sample_sizes(n: int) -> list[int]:
    """The k of pass@k: powers of two from 2 on, and n."""
    return sorted({k for k in (2**power for power in range(1, n.bit_length())) if k <= n} | ({n} if n > 1 else set()))


def bootstrap(values: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean over questions [Q] with the percentile interval of means over questions drawn with replacement."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // scores.size)
    means = np.concatenate(
        [
            scores[rng.integers(0, scores.size, (min(rows, resamples - start), scores.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(scores.mean()), float(low), float(high))


def compare_paired(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """B - A over the same questions [Q]: mean, bootstrap interval over questions, sign-flip permutation test.

    The test flips the sign of each question's difference at random: its p-value is (1 + flips at least as far from
    zero) / (1 + flips), so never 0. Raises ValueError for different or no questions.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError(f"need scores of the same questions, at least one: {first.shape} and {second.shape}")
    gaps = second - first
    rng = np.random.default_rng(seed)
    observed = abs(gaps.sum())
    moved = gaps[gaps != 0]  # the sign of a zero changes nothing
    rows = max(1, _CHUNK // max(1, moved.size))
    extreme = 0
    for start in range(0, resamples, rows):
        signs = rng.integers(0, 2, (min(rows, resamples - start), moved.size), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= observed - 1e-9).sum())
    return PairedDifference(
        difference=bootstrap(gaps, confidence, resamples, seed),
        p_value=(1 + extreme) / (1 + resamples),
        num_questions=gaps.size,
        num_better=int((gaps > 0).sum()),
        num_worse=int((gaps < 0).sum()),
    )


def wilson_interval(num_right: int, num_trials: int, confidence: float = 0.95) -> Estimate:
    """A share with Wilson's score interval, which stays in 0..1 and is honest for few trials (Wilson 1927).

    Raises ValueError unless 0 <= num_right <= num_trials and num_trials > 0.
    """
    if num_trials <= 0 or not 0 <= num_right <= num_trials:
        raise ValueError(f"need 0 <= num_right <= num_trials and a trial: {num_right} of {num_trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / num_trials
    scale = 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    reach = z / scale * sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach))


def estimates(scores: Mapping[str, ArrayLike], confidence: float = 0.95, seed: int = 0) -> dict[str, Estimate]:
    """Each metric's mean and interval."""
    return {name: bootstrap(values, confidence, seed=seed) for name, values in scores.items()}
