"""EMPO: a rollout is worth the share of the group that means the same (arXiv 2504.05812).

Reward: the share of the rollouts whose answer is in the rollout's class; 0 without an answer. Raising it lowers the
entropy over meanings. The paper leaves out questions whose entropy over meanings is very low or very high; here none
are left out. Its classes of free texts come from a model; here they are the classes of final answers.
"""

import numpy as np

from megatron_coreward.rewards.methods.base import NO_ANSWER, GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class Empo:
    name = "empo"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, (group.view,), "policy")
        (given,) = classes.of_groups
        shares = np.append(classes.shares(), np.float32(0.0))  # the last is that of no answer
        return GroupReward(None, shares[np.where(given == NO_ANSWER, len(shares) - 1, given)])
