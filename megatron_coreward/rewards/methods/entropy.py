"""Entropy minimisation, a baseline without labels: the surer of its tokens the policy is, the better.

Reward: minus the mean over the response tokens of the entropy of the next-token distribution, in nats.
"""

from megatron_coreward.rewards.methods.base import Evidence, Judgement, Needs
from megatron_coreward.types import RolloutGroup


class Entropy:
    name = "entropy"
    needs = Needs(token_stats=True)

    def judge(self, group: RolloutGroup, evidence: Evidence) -> Judgement:
        return Judgement(None, -evidence.sequence_means(group, "entropy"))
