"""Co-rewarding-II: a slowly moving teacher labels the policy's rollouts (arXiv 2508.00410).

The label is the vote over the teacher's rollouts of the same question; the teacher is an average over past policies.
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class CoRewardingII:
    name = "co_rewarding_ii"
    needs = Needs(teacher=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, group.view, "teacher")
        return GroupReward(label, context.matches(group, label))
