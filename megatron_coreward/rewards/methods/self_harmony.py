"""Self-Harmony: the answer that both wordings of a question agree on is the label (arXiv 2511.01191).

With p0(a) and p1(a) the shares of an answer among the rollouts of the question and of its rephrasing, the label is the
answer with the highest harmonic mean 2 p0 p1 / (p0 + p1), and rollouts of both views are rewarded against it. An answer
that one view never gives has mean 0, so without an answer in common there is no label.

The label is the paper's. Its views are not: there, one response both rewrites the question and solves it, here the
rephrasing is a prompt of its own, from a file or from the policy itself (`data.online_rephrasing`).
"""

import numpy as np

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext, leader
from megatron_coreward.types import VIEWS, FloatArray, RolloutGroup


def harmonic_mean(p0: FloatArray, p1: FloatArray) -> FloatArray:
    """[C] of two shares [C]; 0 if one of them is."""
    total = p0 + p1
    means = np.zeros_like(total)
    np.divide(2 * p0 * p1, total, out=means, where=total > 0)
    return means


class SelfHarmony:
    name = "self_harmony"
    needs = Needs(views=VIEWS)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        classes = context.answer_classes(group.uid, VIEWS, "policy")
        best = leader(harmonic_mean(classes.shares(0), classes.shares(1)), context.min_margin)
        label = None if best is None else classes.spellings[best]
        rewards = classes.of_groups[VIEWS.index(group.view)] == (-2 if best is None else best)
        return GroupReward(label, rewards.astype(np.float32))
