"""Who may read what: a method sees what its needs name, alone and as a part of a mixture."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_coreward.rewards.methods.base import AnswerClasses, Needs, RewardContext, Statistic
from megatron_coreward.types import FloatArray, Role, RolloutGroup, View


def require_vote(needs: Needs, view: View, role: Role) -> None:
    """PermissionError: the needs do not name the answers of this role on this view."""
    if role == "teacher" and not needs.teacher:
        raise PermissionError("the method asks for a vote of the teacher, but does not declare it in its needs")
    if view not in needs.sampled_views(role):
        raise PermissionError(
            f"the method asks for a vote of the {role} on the {view} view, but does not declare it in its needs"
        )


def require_ground_truth(needs: Needs) -> None:
    """PermissionError: the needs do not name the data set's answers."""
    if not needs.ground_truth:
        raise PermissionError("the method asks for the data set's answer, but does not declare it in its needs")


def require_token_stats(needs: Needs) -> None:
    """PermissionError: the needs do not name token statistics."""
    if not needs.token_stats:
        raise PermissionError("the method asks for token statistics, but does not declare them in its needs")


@dataclass(frozen=True, slots=True)
class NarrowedContext:
    """A `RewardContext` that shows no more of another one than a part's own needs name."""

    needs: Needs
    whole: RewardContext

    @property
    def min_margin(self) -> float:
        return self.whole.min_margin

    def label_from_vote(self, uid: str, view: View, role: Role) -> str | None:
        require_vote(self.needs, view, role)
        return self.whole.label_from_vote(uid, view, role)

    def answer_classes(self, uid: str, views: Sequence[View], role: Role) -> AnswerClasses:
        for view in views:
            require_vote(self.needs, view, role)
        return self.whole.answer_classes(uid, views, role)

    def ground_truth(self, uid: str) -> str | None:
        require_ground_truth(self.needs)
        return self.whole.ground_truth(uid)

    def sequence_means(self, group: RolloutGroup, statistic: Statistic) -> FloatArray:
        require_token_stats(self.needs)
        return self.whole.sequence_means(group, statistic)

    def matches(self, group: RolloutGroup, label: str | None) -> FloatArray:
        return self.whole.matches(group, label)
