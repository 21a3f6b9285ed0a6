"""Right or wrong: the answers of a question against the data set's answer, and against each other.

This is where evaluation meets gold answers; training never calls it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import majority_vote


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """What the n samples of one question are worth."""

    right: tuple[bool, ...]  # [n]
    majority: str | None  # the answer that most samples gave; None without any
    majority_right: bool


def score_answers(
    answers: Sequence[str | None], ground_truth: str | None, equivalence: AnswerEquivalence
) -> GradedAnswer:
    """Judges n samples of a question; without a gold answer none is right."""
    majority = majority_vote(answers, equivalence).label
    return GradedAnswer(
        right=tuple(equivalence.equivalent(answer, ground_truth) for answer in answers),
        majority=majority,
        majority_right=equivalence.equivalent(majority, ground_truth),
    )
