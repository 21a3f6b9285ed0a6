"""Co-rewarding-I+II on the original questions alone, as the published implementation combines the two (`use_aug`).

The teacher samples the rephrasing only and the policy the original only; the policy's rollouts are judged against the
teacher's vote. Half of the rollouts and of the update of `co_rewarding_i+ii`.
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext, other_view
from megatron_coreward.types import RolloutGroup


class CoRewardingIAndIIOriginal:
    name = "co_rewarding_i+ii_original"
    needs = Needs(teacher=True, teacher_views=("rephrased",))

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, other_view(group.view), "teacher")
        return GroupReward(label, context.matches(group, label))
