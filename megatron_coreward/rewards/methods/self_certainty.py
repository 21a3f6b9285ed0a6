"""Self-certainty, a baseline without labels: the further from uniform the policy's distributions, the better.

Reward: the mean over the response tokens of KL(uniform || p), in nats (Intuitor, arXiv 2505.19590).
"""

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class SelfCertainty:
    name = "self_certainty"
    needs = Needs(token_stats=True)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        return GroupReward(None, context.sequence_means(group, "self_certainty"))
