"""What a method needs of the loop, in terms that planning, checks and the loop share."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_coreward.config.views import VIEWS, Role, View


@dataclass(frozen=True, slots=True)
class Needs:
    """What the loop must provide before a method can judge."""

    views: tuple[View, ...] = ("original",)  # sampled from the policy and trained on; none: whatever others sample
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


def together(parts: Iterable[Needs]) -> Needs:
    """What several methods need at once. Parts that name no view get those of the others, or the original."""
    every = tuple(parts)

    def in_order(views: Iterable[View]) -> tuple[View, ...]:
        wanted = set(views)
        return tuple(view for view in VIEWS if view in wanted)

    views = in_order(view for needs in every for view in needs.views) or ("original",)
    teacher_views = in_order(view for needs in every for view in needs.sampled_views("teacher"))
    return Needs(
        views=views,
        teacher=any(needs.teacher for needs in every),
        teacher_views=() if teacher_views == views else teacher_views,
        token_stats=any(needs.token_stats for needs in every),
        ground_truth=any(needs.ground_truth for needs in every),
    )
