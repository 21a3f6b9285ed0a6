"""Confidence voting: votes weigh as much as the policy was sure of the tokens that led to them.

The weight of a rollout is the geometric mean of the probabilities of its tokens, exp(mean log p), and the label is the
answer with the highest sum of weights: the weighted vote of confidence-informed self-consistency (arXiv 2502.06233)
with the response's own probability as its confidence and a temperature of 1. That paper votes to answer; rewarding
rollouts by such a vote is as in majority voting. The log-probs are those that the engine returned with the samples.
`rewards.min_margin` is a share of the whole weight.
"""

import numpy as np

from megatron_coreward.rewards.methods.base import NO_ANSWER, GroupReward, Needs, RewardContext, leader
from megatron_coreward.types import RolloutGroup


class ConfidenceVoting:
    name = "confidence_voting"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, (group.view,), "policy")
        (given,) = classes.of_groups
        means = np.array([np.mean(c.logprobs, dtype=np.float64) if len(c.logprobs) else 0 for c in group.completions])
        weights = np.exp(means) / np.exp(means).sum()
        answered = given != NO_ANSWER
        scores = np.bincount(given[answered], weights[answered], minlength=len(classes.spellings))
        best = leader(scores.astype(np.float32), context.min_margin)
        label = None if best is None else classes.spellings[best]
        return GroupReward(label, (given == (-2 if best is None else best)).astype(np.float32))
