"""Majority voting, a baseline: the policy's own vote on the same group is the label (arXiv 2508.00410)."""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class MajorityVoting:
    name = "majority_voting"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, group.view, "policy")
        return GroupReward(label, context.matches(group, label))
