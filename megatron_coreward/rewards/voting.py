"""The majority vote: from the answers of one group to a pseudo-label (arXiv 2508.00410).

Invariants: a rollout without an answer never wins and still counts in G; the label depends on the order of the answers
only through ties and through which spelling stands for the winning class.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_coreward.rewards.equivalence import AnswerEquivalence


@dataclass(frozen=True, slots=True)
class Vote:
    """The outcome of one vote; G is the number of rollouts, those without an answer included."""

    label: str | None  # first seen member of the winning class; None without any answer or if the vote abstains
    share: float  # members of the leading class / G; 0 without any answer
    margin: float  # (members of the leading class - members of the runner-up, or 0 without one) / G
    tie: bool  # whether the runner-up has as many members as the leading class
    abstained: bool  # whether there was a leading class and its margin was too small
    num_rollouts: int  # G
    num_answers: int  # rollouts with an answer
    num_classes: int  # distinct answers
    winners: tuple[int, ...]  # rollouts in the leading class; empty if there is no label
    entropy: float = 0.0  # of the classes over the rollouts with an answer, as a share of log G: 1 if no two agree


def majority_vote(
    answers: Sequence[str | None], equivalence: AnswerEquivalence | None = None, min_margin: float = 0.0
) -> Vote:
    """The vote over the equivalence classes of G answers (None or blank: no answer).

    The largest class wins, of several the one that was seen first. The vote abstains where its margin is below
    `min_margin` (0..1); at 0 it never does, not even in a tie. Without a judge, answers are compared as strings.
    Raises ValueError for a `min_margin` outside 0..1.
    """
    if not 0.0 <= min_margin <= 1.0:
        raise ValueError(f"min_margin must lie in 0..1, got {min_margin}")
    classes = (equivalence or AnswerEquivalence("exact")).classes(answers)
    # most_common() keeps first-seen order among equals, and classes are numbered in that order.
    ranking = Counter(index for index in classes if index is not None).most_common()
    leader, count = ranking[0] if ranking else (None, 0)
    runner_up = ranking[1][1] if len(ranking) > 1 else 0
    margin = (count - runner_up) / len(answers) if ranking else 0.0
    abstained = leader is not None and margin < min_margin
    winners = tuple(i for i, index in enumerate(classes) if index == leader) if ranking and not abstained else ()
    return Vote(
        label=answers[winners[0]] if winners else None,
        share=count / len(answers) if ranking else 0.0,
        margin=margin,
        tie=count > 0 and count == runner_up,
        abstained=abstained,
        num_rollouts=len(answers),
        num_answers=sum(index is not None for index in classes),
        num_classes=len(ranking),
        winners=winners,
        entropy=_entropy([size for _, size in ranking], len(answers)),
    )


def _entropy(sizes: Sequence[int], num_rollouts: int) -> float:
    total = sum(sizes)
    nats = sum(size / total * math.log(total / size) for size in sizes)
    return nats / math.log(num_rollouts) if num_rollouts > 1 else 0.0
