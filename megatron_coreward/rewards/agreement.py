"""Telemetry of labels: how sure, how stable and how right the votes of one step were.

Pure functions from votes, groups and judgements to flat metrics. Rates are shares in 0..1. A metric that has nothing to
count is left out rather than reported as zero. Gold answers enter here and nowhere else on the way of a label-free
method: what comes out are numbers for a log, never a label or a reward.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from megatron_coreward.algorithms.accuracy import wilson_interval
from megatron_coreward.rewards.context import GroupKey
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward
from megatron_coreward.rewards.voting import Vote
from megatron_coreward.types import FloatArray, Role, RolloutGroup, View

ROLES: tuple[Role, ...] = ("policy", "teacher")


def vote_metrics(votes: Mapping[GroupKey, Vote]) -> dict[str, float]:
    """The policy's votes as `vote/...`, the teacher's as `teacher_vote/...`; means over its votes.

    share and margin of the leading class, rates of ties, of abstentions and of rollouts without an answer, distinct
    answers a group, and their entropy as a share of the largest; `label_variety`, distinct labels over all labels of a
    view, which falls when a policy answers every question alike.
    """
    metrics: dict[str, float] = {}
    for role in ROLES:
        cast = [vote for (_, _, voter), vote in votes.items() if voter == role]
        if not cast:
            continue
        means: dict[str, list[float]] = {
            "share": [vote.share for vote in cast],
            "margin": [vote.margin for vote in cast],
            "tie_rate": [vote.tie for vote in cast],
            "abstention_rate": [vote.abstained for vote in cast],
            "no_answer_rate": [1.0 - vote.num_answers / vote.num_rollouts for vote in cast if vote.num_rollouts],
            "distinct_answers": [vote.num_classes for vote in cast],
            "entropy": [vote.entropy for vote in cast],
            "label_variety": _variety(votes, role),
        }
        area = "vote" if role == "policy" else "teacher_vote"
        metrics |= {f"{area}/{name}": fmean(values) for name, values in means.items() if values}
    return metrics


def _variety(votes: Mapping[GroupKey, Vote], role: Role) -> list[float]:
    labels: dict[View, list[str]] = {}
    for (_, view, voter), vote in votes.items():
        if voter == role and vote.label is not None:
            labels.setdefault(view, []).append(vote.label)
    return [len(set(of_view)) / len(of_view) for of_view in labels.values()]


def agreement_metrics(votes: Mapping[GroupKey, Vote], equivalence: AnswerEquivalence) -> dict[str, float]:
    """How often two votes on one question have equivalent labels; pairs without two labels do not agree.

    `label/view_agreement`: original against rephrased, of one role; `label/teacher_agreement`: policy against teacher,
    on one view.
    """
    views = [
        equivalence.equivalent(vote.label, votes[uid, "rephrased", role].label)
        for (uid, view, role), vote in votes.items()
        if view == "original" and (uid, "rephrased", role) in votes
    ]
    roles = [
        equivalence.equivalent(vote.label, votes[uid, view, "teacher"].label)
        for (uid, view, role), vote in votes.items()
        if role == "policy" and (uid, view, "teacher") in votes
    ]
    rates = {"label/view_agreement": views, "label/teacher_agreement": roles}
    return {name: fmean(hits) for name, hits in rates.items() if hits}


def relation_metrics(
    exact_votes: Mapping[GroupKey, Vote], math_votes: Mapping[GroupKey, Vote], math_equivalence: AnswerEquivalence
) -> dict[str, float]:
    """What the choice of the equivalence relation changed, over votes on the same groups.

    `vote/exact_vs_math_disagreement`: share of groups whose labels are not equivalent mathematically (one of them
    abstaining counts; both without a label do not); `vote/exact_vs_math_changed_rollouts`: share of rollouts that are
    among the winners of one vote only. Raises ValueError for votes on different groups.
    """
    if exact_votes.keys() != math_votes.keys():
        raise ValueError("the exact and the math votes are not on the same groups")
    if not exact_votes:
        return {}
    pairs = [(exact, math_votes[key]) for key, exact in exact_votes.items()]
    disagree = [
        exact.label != math.label and not math_equivalence.equivalent(exact.label, math.label) for exact, math in pairs
    ]
    changed = sum(len(set(exact.winners) ^ set(math.winners)) for exact, math in pairs)
    rollouts = sum(exact.num_rollouts for exact, _ in pairs)
    return {
        "vote/exact_vs_math_disagreement": fmean(disagree),
        "vote/exact_vs_math_changed_rollouts": changed / rollouts if rollouts else 0.0,
    }


def reward_metrics(group_rewards: Sequence[GroupReward], advantages: Sequence[FloatArray]) -> dict[str, float]:
    """What the groups were given; `advantages` [G] of each, exactly zero where its rewards had no variance.

    `reward/mean` and `reward/std` over all rollouts, `advantage/zero_variance_share` (they teach nothing),
    `label/missing_rate` (groups without a label, by abstention or by method).
    """
    if not group_rewards:
        return {}
    rewards = np.concatenate([group_reward.rewards for group_reward in group_rewards]).astype(np.float64)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "advantage/zero_variance_share": fmean(not group.any() for group in advantages),
        "label/missing_rate": fmean(group_reward.label is None for group_reward in group_rewards),
    }


def ground_truth_metrics(
    groups: Sequence[RolloutGroup],
    group_rewards: Sequence[GroupReward],
    ground_truths: Mapping[str, str | None],
    equivalence: AnswerEquivalence,
) -> dict[str, float]:
    """How right labels and rollouts were, over the groups whose question has a gold answer.

    `label/accuracy`: groups whose label is equivalent to the gold answer (a missing label is wrong; left out for a
    method that gives no labels at all), with the ends of its 95% interval as `_low` and `_high`; `rollout/accuracy`:
    rollouts whose answer is; `reward/accuracy`: rollouts that were rewarded rightly, which are those with a right
    answer that got more than the mean of their group and those with a wrong one that did not. (In a group without
    variance, any reward above zero counts as rewarded.)
    """
    known = [
        (group, group_reward, ground_truth)
        for group, group_reward in zip(groups, group_rewards, strict=True)
        if (ground_truth := ground_truths.get(group.uid)) is not None
    ]
    metrics: dict[str, float] = {}
    if any(group_reward.label is not None for _, group_reward, _ in known):
        hits = [equivalence.equivalent(group_reward.label, ground_truth) for _, group_reward, ground_truth in known]
        accuracy = wilson_interval(sum(hits), len(hits))
        metrics["label/accuracy"] = accuracy.value
        metrics |= {"label/accuracy_low": accuracy.low, "label/accuracy_high": accuracy.high}
    if known:
        right = [
            equivalence.equivalent(answer, ground_truth) for group, _, ground_truth in known for answer in group.answers
        ]
        metrics["rollout/accuracy"] = fmean(right)
        rewarded = [given for _, group_reward, _ in known for given in _rewarded(group_reward.rewards)]
        metrics["reward/accuracy"] = fmean(a == b for a, b in zip(right, rewarded, strict=True))
    return metrics


def _rewarded(rewards: FloatArray) -> list[bool]:
    """[G] whether a rollout was rewarded, against the others of its group."""
    threshold = float(rewards.mean()) if np.ptp(rewards) > 0 else 0.0
    return [bool(reward > threshold) for reward in rewards]
