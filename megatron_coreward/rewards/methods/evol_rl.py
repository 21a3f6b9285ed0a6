"""EVOL-RL: the majority decides the sign of a reward, novelty its size (arXiv 2509.15194).

A rollout's novelty is 1 - (mean similarity to the others of its side + largest similarity to any other) / 2, the sides
being those that give the majority answer and those that give another; alone on its side, the mean is over all others.
Novelties are scaled to 0..1 within a side (1/2 each if all are equal), and

    reward = 1/2 + novelty / 2   with the majority answer (1 if alone with it)
    reward = -1 + novelty / 2    with another one (-1/2 if alone)
    reward = -1                  without an answer

as in the release, with one exception: if exactly one rollout has an answer, the release gives -1 to all, and here that
rollout gets 1. In the release, similarity is the cosine of embeddings of another model; here it is the cosine of counts
of token pairs, which needs no model and sees words, not meanings. The paper also asks for an entropy bonus and a higher
upper clip: `loss.entropy_coef` and `loss.clip_high`. Without a label all rewards are 0.
"""

from collections import Counter
from itertools import pairwise

import numpy as np

from megatron_coreward.rewards.methods.base import NO_ANSWER, GroupReward, Needs, RewardContext
from megatron_coreward.types import FloatArray, IntArray, RolloutGroup


def similarities(responses: list[IntArray]) -> FloatArray:
    """[G, G] cosines of the counts of token pairs; 0 for a response of fewer than two tokens."""
    counts = [Counter(pairwise(tokens.tolist())) for tokens in responses]
    number = {pair: place for place, pair in enumerate(dict.fromkeys(pair for of_one in counts for pair in of_one))}
    vectors = np.zeros((len(counts), len(number)))
    for row, of_one in zip(vectors, counts, strict=True):
        for pair, count in of_one.items():
            row[number[pair]] = count
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.zeros_like(vectors)
    np.divide(vectors, norms, out=unit, where=norms > 0)
    cosines: FloatArray = (unit @ unit.T).astype(np.float32)
    return cosines


def novelties(similarity: FloatArray, side: list[int], everyone: list[int]) -> FloatArray:
    """[len(side)] of the rollouts of a side among everyone's, scaled to 0..1."""
    found = []
    for i in side:
        others = [j for j in everyone if j != i]
        beside = [j for j in side if j != i] or others
        if not others:
            return np.ones(1, dtype=np.float32)
        found.append(1 - 0.5 * similarity[i, beside].mean() - 0.5 * similarity[i, others].max())
    if len(found) == 1:
        return np.ones(1, dtype=np.float32)
    raw = np.asarray(found, dtype=np.float32)
    spread = float(np.ptp(raw))
    return (raw - raw.min()) / np.float32(spread) if spread > 1e-6 else np.full_like(raw, 0.5)


class EvolRl:
    name = "evol_rl"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        label = context.label_from_vote(group.uid, group.view, "policy")
        if label is None:
            return GroupReward(None, np.zeros(len(group.completions), dtype=np.float32))
        (given,) = context.answer_classes(group.uid, (group.view,), "policy").of_groups
        right = context.matches(group, label) > 0
        everyone = np.flatnonzero(given != NO_ANSWER).tolist()
        similarity = similarities([completion.token_ids for completion in group.completions])
        rewards = np.full(len(given), -1.0, dtype=np.float32)
        for lowest, side in ((0.5, right), (-1.0, ~right & (given != NO_ANSWER))):
            members = np.flatnonzero(side).tolist()
            if members:
                rewards[members] = lowest + 0.5 * novelties(similarity, members, everyone)
        return GroupReward(label, rewards)
