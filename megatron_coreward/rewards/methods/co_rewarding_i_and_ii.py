"""Co-rewarding-I+II: the teacher labels across views, so label and rollout share neither wording nor weights.

The policy and the teacher sample both views; rollouts of one are judged against the teacher's vote on the other.
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext, other_view
from megatron_coreward.types import RolloutGroup


class CoRewardingIAndII:
    name = "co_rewarding_i+ii"
    needs = Needs(views=("original", "rephrased"), teacher=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, other_view(group.view), "teacher")
        return GroupReward(label, context.matches(group, label))
