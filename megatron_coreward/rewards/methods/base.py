"""What a method is: the needs it declares, and how it judges one group of rollouts.

The loop gathers the evidence that the needs name and asks the method to judge each group of policy rollouts. Labels
are a source among others: a vote of some role on some view, the data set's answer, or nothing at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.algorithms.advantages import group_advantages
from megatron_coreward.config.needs import Needs as Needs
from megatron_coreward.types import FloatArray, IntArray, Role, RolloutGroup, View

Statistic = Literal["entropy", "self_certainty"]

NO_ANSWER = -1  # the class of a rollout without an answer


@dataclass(frozen=True, slots=True)
class GroupReward:
    """The outcome for one group: its label (None: none was used or the vote abstained) and a reward a rollout."""

    label: str | None
    rewards: FloatArray  # [G]
    advantages: FloatArray | None = None  # [G] of a method that computes its own; None: those of the rewards

    def of_rollouts(self, rows: NDArray[np.integer[Any]]) -> "GroupReward":
        """The same of some of the rollouts."""
        advantages = None if self.advantages is None else self.advantages[rows]
        return GroupReward(self.label, self.rewards[rows], advantages)

    def advantages_of_group(self, by_std: bool = True) -> FloatArray:
        """[G] the method's own advantages, or those of its rewards (`algorithms.advantages.group_advantages`).

        Raises ValueError if any is not finite: a single one would make every weight NaN.
        """
        values = self.rewards if self.advantages is None else self.advantages
        if not np.isfinite(values).all():
            what = "rewards" if self.advantages is None else "advantages"
            raise ValueError(f"{what} must be finite numbers, found {values.tolist()}")
        if self.advantages is not None:
            return self.advantages
        return group_advantages(self.rewards, by_std).astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class AnswerClasses:
    """The answers of one or several groups, by what they mean."""

    of_groups: tuple[IntArray, ...]  # [G] each: class of each rollout's answer, counted from 0; NO_ANSWER without one
    spellings: tuple[str, ...]  # [C] the answer that was the first of each class

    def shares(self, place: int = 0) -> FloatArray:
        """[C] rollouts of a group in each class over G; rollouts without an answer count in G."""
        of_group = self.of_groups[place]
        counts = np.bincount(of_group[of_group != NO_ANSWER], minlength=len(self.spellings))
        return (counts / max(1, len(of_group))).astype(np.float32)


def leader(scores: FloatArray, min_margin: float = 0.0) -> int | None:
    """The class with the highest of the scores [C], the first of several; None if none is above 0, or if the lead over
    the runner-up (0 without one) is below `min_margin`."""
    if not len(scores) or scores.max() <= 0:
        return None
    ranked = np.sort(scores)[::-1]
    margin = float(ranked[0] - (ranked[1] if len(ranked) > 1 else 0.0))
    return None if margin < min_margin else int(scores.argmax())


def other_view(view: View) -> View:
    """The view that stands across from `view`."""
    return "rephrased" if view == "original" else "original"


class RewardContext(Protocol):
    """What a method may look at. Asking for something it did not declare in its needs raises PermissionError."""

    @property
    def min_margin(self) -> float:
        """The setting `rewards.min_margin`, for methods that hold a vote of their own."""

    def label_from_vote(self, uid: str, view: View, role: Role) -> str | None:
        """Majority answer of the group that `role` sampled for `view`; None if the vote abstains."""

    def answer_classes(self, uid: str, views: Sequence[View], role: Role) -> AnswerClasses:
        """The answers of the groups that `role` sampled for `views`, classed together: a class spans the groups.
        The teacher's cannot be asked for under `teacher.early_stop`, which leaves those that decide its vote."""

    def ground_truth(self, uid: str) -> str | None:
        """The data set's answer."""

    def sequence_means(self, group: RolloutGroup, statistic: Statistic) -> FloatArray:
        """[G] mean of a token statistic over each response."""

    def matches(self, group: RolloutGroup, label: str | None) -> FloatArray:
        """[G] 1.0 if the rollout's answer is equivalent to the label, else 0.0; all 0.0 without a label."""


class Method(Protocol):
    """A rule of rewards. It keeps nothing from one group to the next, so that a resumed run judges as before."""

    name: str
    needs: Needs
    # One whose `score` returns advantages says so: `own_advantages = True`. Such a method cannot be mixed.

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        """Rewards for one group of policy rollouts."""
