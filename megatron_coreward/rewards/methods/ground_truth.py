"""Ground truth, a baseline with labels (GT-GRPO): the data set's answer is the label."""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class GroundTruth:
    name = "ground_truth"
    needs = Needs(ground_truth=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.ground_truth(group.uid)
        return GroupReward(label, context.matches(group, label))
