"""SCRL: a positive label only for a strict consensus, negative ones for rare and unsure answers (arXiv 2603.19880).

With p(a) the share of an answer, H(a) the mean entropy of the responses that give it and H that of the whole group:

    positive   the most frequent answer, if p >= `min_share` and it leads by more than `min_lead`
    negative   every other answer with p < `rare` and H(a) >= H
    reward     p(a) for the positive one, p(a) - `rare` for negative ones, 0 for the rest,
               each less `entropy_weight` (H(a) - H); -1 without an answer

These are the rewards of the release's continuous mode with its default thresholds; the paper's text has 0.375, 0.125
and 0.125 for groups of 32 and more, under which no answer of 8 rollouts would ever be rare. The paper votes over twice
as many rollouts as it trains on; here the group is all there is.
"""

import numpy as np

from megatron_coreward.rewards.methods.base import NO_ANSWER, GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class Scrl:
    name = "scrl"
    needs = Needs(token_stats=True)

    def __init__(
        self, min_share: float = 0.5, min_lead: float = 0.15, rare: float = 0.15, entropy_weight: float = 0.1
    ) -> None:
        """Thresholds in shares of the group; the weight in rewards per nat."""
        self.min_share, self.min_lead, self.rare, self.entropy_weight = min_share, min_lead, rare, entropy_weight

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, (group.view,), "policy")
        (given,), shares = classes.of_groups, classes.shares()
        entropy = context.sequence_means(group, "entropy")
        rewards = np.full(len(given), -1.0, dtype=np.float32)
        if not len(shares):
            return GroupReward(None, rewards)
        ranked = np.sort(np.append(shares, 0.0))[::-1]
        consensus = ranked[0] >= self.min_share and ranked[0] - ranked[1] > self.min_lead
        positive = int(shares.argmax()) if consensus else NO_ANSWER
        for answer, share in enumerate(shares):
            givers = given == answer
            excess = entropy[givers].mean() - entropy.mean()
            negative = answer != positive and share < self.rare and excess >= 0
            base = share if answer == positive else share - self.rare if negative else 0.0
            rewards[givers] = base - self.entropy_weight * excess
        return GroupReward(classes.spellings[positive] if consensus else None, rewards)
