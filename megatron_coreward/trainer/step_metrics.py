"""The metrics of a step: what was sampled, how it was rewarded, what the update did. For people, not for training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_coreward.algorithms.repetition import repeated_ngrams
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.agreement import (
    agreement_metrics,
    ground_truth_metrics,
    relation_metrics,
    reward_metrics,
    vote_metrics,
)
from megatron_coreward.rewards.context import GroupKey
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import Vote, majority_vote
from megatron_coreward.trainer.experience import Experience
from megatron_coreward.trainer.staleness import staleness_metrics
from megatron_coreward.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Updates:
    """The optimizer steps of a batch."""

    reports: list[dict[str, float]]  # of each: what the actors report, sums over response tokens
    kl_coef: float  # weight of the KL term


def of_step(
    config: RunConfig, experience: Experience, updates: Updates, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Rewards, rollouts, losses, weight sync and label quality of one step.

    Args:
        seconds: wall time of the step's phases so far.
    """
    groups, teacher_groups, syncs = experience.rollouts.policy, experience.rollouts.teacher, experience.rollouts.syncs
    lengths = np.asarray([len(c.token_ids) for group in groups for c in group.completions])
    cut_off = [c.finish_reason == "length" for group in groups for c in group.completions]
    sampled = int(lengths.sum()) + sum(len(c.token_ids) for group in teacher_groups for c in group.completions)
    metrics = reward_metrics(experience.group_rewards, experience.advantages)
    metrics |= {
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/truncated_share": float(np.mean(cut_off)),
        "rollout/repeated_ngrams": repeated_ngrams([c.token_ids for group in groups for c in group.completions]),
    }
    # Else the rollouts are from the rollout log, or were drawn while the actors learnt.
    if "rollout" in seconds and not config.rollout.max_staleness:
        metrics["rollout/tokens_per_s"] = sampled / seconds["rollout"]
    metrics |= _loss(updates.reports)
    if "loss/kl" in metrics:
        metrics["loss/kl_coef"] = updates.kl_coef
    if config.rollout.max_staleness:
        metrics |= staleness_metrics(groups, experience.num_updates, config.loss.updates_per_batch)
    if syncs:
        metrics["sync/seconds"] = sum(report.seconds for report in syncs)
        metrics["sync/canary_gap"] = max(report.canary_gap for report in syncs)
        limits = [report.limit for report in syncs if report.limit is not None]
        if limits:
            metrics["sync/canary_limit"] = max(limits)  # policy and teacher have one each if they share no engines
    return metrics | _label_quality(experience)


def _loss(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the tokens of all updates; learning rate and gradient norm of the last one."""
    tokens = max(1.0, sum(update["tokens"] for update in updates))

    def mean(key: str) -> float:
        return sum(update[key] for update in updates) / tokens

    metrics = {
        "loss/policy": float(np.mean([update["loss/policy"] for update in updates])),
        "loss/total": float(np.mean([update["loss/total"] for update in updates])),
        "loss/clip_share": mean("clipped"),
        "rollout/entropy": mean("entropy"),
        "rollout/self_certainty": mean("self_certainty"),
        "optim/lr": updates[-1]["lr"],
        "optim/grad_norm": updates[-1]["grad_norm"],
        "optim/skipped_updates": sum(update.get("max:skipped", 0.0) for update in updates),
        # Later updates of a batch have moved away from the weights that sampled it.
        "sync/logprob_gap": updates[0]["logprob_gap"] / max(1.0, updates[0]["tokens"]),
        "sync/logprob_gap_max": updates[0]["max:logprob_gap"],
    }
    if "kl" in updates[0]:
        metrics["loss/kl"] = mean("kl")
    if "mismatch_affected" in updates[0]:
        metrics["loss/mismatch_affected_share"] = mean("mismatch_affected")
    return metrics


def _label_quality(experience: Experience) -> dict[str, float]:
    """Votes and how right they were. Ground truths are read here, after the update, and go nowhere but into the row."""
    groups, votes, equivalence = experience.rollouts.policy, experience.context.votes(), experience.context.equivalence
    equivalence.compare([(*group.answers, experience.ground_truths.get(group.uid)) for group in groups])
    return (
        vote_metrics(votes)
        | agreement_metrics(votes, equivalence)
        | ground_truth_metrics(groups, experience.group_rewards, experience.ground_truths, equivalence)
        | _relations(groups, votes, equivalence)
    )


def _relations(
    groups: Sequence[RolloutGroup], votes: Mapping[GroupKey, Vote], equivalence: AnswerEquivalence
) -> dict[str, float]:
    """What the choice between `exact` and `math` changes. Unless the run compares by it, `math` stands for its normal
    forms: the symbolic comparison would cost more than the step for a figure that nobody trains on."""
    keys = [(group.uid, group.view, group.role) for group in groups]

    def voted(by: AnswerEquivalence) -> dict[GroupKey, Vote]:
        # Without a least margin: a vote that did not abstain is the same with it.
        known = votes if by is equivalence else {}
        return {
            key: majority_vote(group.answers, by) if key not in known or known[key].abstained else known[key]
            for key, group in zip(keys, groups, strict=True)
        }

    exact = equivalence if equivalence.relation == "exact" else AnswerEquivalence("exact")
    math = equivalence if equivalence.relation == "math" else AnswerEquivalence("math", symbolic=False)
    return relation_metrics(voted(exact), voted(math), math)
