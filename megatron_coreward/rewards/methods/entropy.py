"""Entropy minimisation, a baseline without labels: the surer of its tokens the policy is, the better.

Reward: minus the mean over the response tokens of the entropy of the next-token distribution, in nats.
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class Entropy:
    name = "entropy"
    needs = Needs(token_stats=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, -context.sequence_means(group, "entropy"))
