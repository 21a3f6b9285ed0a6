"""What a method is: the needs it declares, and how it judges one group of rollouts.

The loop gathers the evidence that the needs name and asks the method to judge each group of policy rollouts. Labels
are a source among others: a vote of some role on some view, the data set's answer, or nothing at all.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_coreward.types import FloatArray, Role, RolloutGroup, View

Statistic = Literal["entropy", "self_certainty"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What the loop must provide before a method can judge."""

    views: tuple[View, ...] = ("original",)  # sampled from the policy and trained on
    teacher: bool = False  # the EMA teacher samples as well
    teacher_views: tuple[View, ...] = ()  # what the teacher samples; none: the same views as the policy
    token_stats: bool = False  # full-vocabulary statistics of the policy on its own rollouts
    ground_truth: bool = False  # the data set's answers

    def sampled_views(self, role: Role) -> tuple[View, ...]:
        """The views that a role samples."""
        if role == "policy":
            return self.views
        return (self.teacher_views or self.views) if self.teacher else ()

    @property
    def all_views(self) -> frozenset[View]:
        """The views that a question must have."""
        return frozenset(self.views + self.teacher_views)


@dataclass(frozen=True, slots=True)
class GroupReward:
    """The outcome for one group: its label (None: none was used or the vote abstained) and a reward a rollout."""

    label: str | None
    rewards: FloatArray  # [G]


def other_view(view: View) -> View:
    """The view that stands across from `view`."""
    return "rephrased" if view == "original" else "original"


class RewardContext(Protocol):
    """What a method may look at. Asking for something it did not declare in its needs raises PermissionError."""

    def label_from_vote(self, uid: str, view: View, role: Role) -> str | None:
        """Majority answer of the group that `role` sampled for `view`; None where the vote abstains."""

    def ground_truth(self, uid: str) -> str | None:
        """The data set's answer."""

    def sequence_means(self, group: RolloutGroup, statistic: Statistic) -> FloatArray:
        """[G] mean of a token statistic over each response."""

    def matches(self, group: RolloutGroup, label: str | None) -> FloatArray:
        """[G] 1.0 where the rollout's answer is equivalent to the label, else 0.0; all 0.0 without a label."""


class Method(Protocol):
    name: str
    needs: Needs

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        """Rewards for one group of policy rollouts."""
