"""RESTRAIN: every answer is a pseudo-label, weighed by how often it was given, and scattered groups are penalised
(arXiv 2510.02172).

With f_j the share of answer j in the group, g a Gaussian around `centre` and w_j = g(f_j) / sum_l g(f_l):

    A_ij = group advantage of rollout i if answer j were the label
    A_i  = u sum_j w_j A_ij                 if the largest share is at least `min_share`
    A_i  = -u penalty                       otherwise: all rewards are 0, so their advantages are, less the penalty

The paper writes one clipped loss for each candidate and adds them with the weights w_j. Here the advantages are added
first and clipped once, which is the same with one update a batch. The weight u of a question is the paper's g of the
largest share, but of the group at hand: the paper takes it from rollouts of the model that training started from, drawn
once beforehand, and reports that to be better. The numbers below are ours, as the paper's full text was not available:
its shares are of 16 or more rollouts.
"""

import numpy as np

from megatron_coreward.algorithms.advantages import group_advantages
from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import FloatArray, RolloutGroup


class Restrain:
    name = "restrain"
    needs = Needs()
    own_advantages = True

    def __init__(self, centre: float = 1.0, width: float = 0.5, min_share: float = 0.25, penalty: float = 0.5) -> None:
        """`centre` and `width` of g, in shares of the group; `min_share` and `penalty` as above, in advantages."""
        self.centre, self.width, self.min_share, self.penalty = centre, width, min_share, penalty

    def shape(self, shares: FloatArray) -> FloatArray:
        """g of shares of the group."""
        heights: FloatArray = np.exp(-((shares - self.centre) ** 2) / (2 * self.width**2)).astype(np.float32)
        return heights

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, (group.view,), "policy")
        (given,), shares = classes.of_groups, classes.shares()
        largest = float(shares.max()) if len(shares) else 0.0
        prompt_weight = float(self.shape(np.array([largest], dtype=np.float32))[0])
        if largest < self.min_share:
            nothing = np.zeros(len(given), dtype=np.float32)
            return GroupReward(None, nothing, np.full_like(nothing, -prompt_weight * self.penalty))
        weights = self.shape(shares) / self.shape(shares).sum()
        of_answers = np.array([given == answer for answer in range(len(shares))], dtype=np.float32)  # [C, G]
        advantages = prompt_weight * weights @ np.stack([group_advantages(rewards) for rewards in of_answers])
        label = classes.spellings[int(shares.argmax())]
        return GroupReward(label, weights @ of_answers, advantages.astype(np.float32))
