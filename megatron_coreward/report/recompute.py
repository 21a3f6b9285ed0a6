"""One step once more, from its dumped rollouts alone: answers, votes, labels, rewards, advantages, label telemetry.

What a dump does not hold cannot be recomputed and is taken as recorded: the rewards of a method that reads token
statistics, and the labels of one that reads the data set's answers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_coreward.algorithms.repetition import repeated_ngrams
from megatron_coreward.config.methods import check_method, parts_of
from megatron_coreward.config.plugins import IMPORT_PATH
from megatron_coreward.config.schema import LossSettings, RewardSettings
from megatron_coreward.errors import InputError
from megatron_coreward.report.run_record import RunRecord
from megatron_coreward.rewards import methods
from megatron_coreward.rewards.agreement import agreement_metrics, ground_truth_metrics, reward_metrics, vote_metrics
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.context import BatchRewardContext, GroupKey
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward, Method
from megatron_coreward.rewards.voting import Vote
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, read_rollouts
from megatron_coreward.telemetry.untrusted_text import MAX_EXCERPT, shortened
from megatron_coreward.types import FloatArray, RolloutGroup


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A step as it comes out now."""

    recorded: tuple[ScoredGroup, ...]  # all groups of the dump, in order
    policy: tuple[ScoredGroup, ...]  # those of the policy
    answers: tuple[tuple[str | None, ...], ...]  # of each of them, from its texts
    votes: Mapping[GroupKey, Vote]
    group_rewards: tuple[GroupReward, ...]  # of each policy group
    advantages: tuple[FloatArray, ...]  # of each policy group, from its recorded rewards
    metrics: Mapping[str, float]


def recompute_step(
    scored: Sequence[ScoredGroup],
    method: Method,
    settings: RewardSettings,
    equivalence: AnswerEquivalence,
    by_std: bool = True,
) -> Recomputed:
    """Everything of a step that its dump determines. `by_std`: of `loss.advantage_std`."""
    policy = tuple(item for item in scored if item.group.role == "policy")
    groups = [item.group for item in policy]
    context = BatchRewardContext(
        replace(method.needs, token_stats=False),
        equivalence,
        policy_groups=groups,
        teacher_groups=[item.group for item in scored if item.group.role == "teacher"],
        ground_truths={item.group.uid: _gold(item) for item in policy} if method.needs.ground_truth else None,
        min_margin=settings.min_margin,
    )
    group_rewards = tuple(
        _as_recorded(item, method) if method.needs.token_stats else method.score(item.group, context) for item in policy
    )
    advantages = tuple(_advantages(item, now, by_std) for item, now in zip(policy, group_rewards, strict=True))
    votes = context.votes()
    return Recomputed(
        recorded=tuple(scored),
        policy=policy,
        answers=tuple(
            tuple(extract_answer(c.text, settings.answer_formats, settings.stop_at) for c in item.group.completions)
            for item in scored
        ),
        votes=votes,
        group_rewards=group_rewards,
        advantages=advantages,
        metrics={
            **_response_metrics(groups),
            **reward_metrics(group_rewards, [values[~np.isnan(values)] for values in advantages]),
            **vote_metrics(votes),
            **agreement_metrics(votes, equivalence),
            **ground_truth_metrics(
                groups, group_rewards, {item.group.uid: item.ground_truth for item in policy}, equivalence
            ),
        },
    )


def recompute_run(
    record: RunRecord,
    settings: RewardSettings,
    equivalence: AnswerEquivalence,
    steps: range | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[int, Recomputed]]:
    """Every dumped step, or those in `steps`; `note` is called for each whose file is damaged, and it is left out.

    Raises InputError if there are none or none can be read, or for an unknown method.
    """
    method, by_std = method_of(record), record.settings("loss", LossSettings).advantage_std
    wanted = [step for step in record.dumps if steps is None or step in steps]
    if not wanted:
        have = f"steps {min(record.dumps)} to {max(record.dumps)} have some" if record.dumps else "there are none"
        raise InputError(
            f"{record.run_dir / 'rollouts'}: no rollouts to recompute from ({have}); "
            "a run keeps them under telemetry.dump_rollouts"
        )
    damaged: InputError | None = None
    some = False
    for step in wanted:
        try:
            scored = read_rollouts(record.dumps[step])
        except InputError as error:
            damaged = error
            note(f"step {step} is left out: {error}")
            continue
        some = True
        yield step, recompute_step(scored, method, settings, equivalence, by_std)
    if damaged is not None and not some:
        raise damaged


def method_of(record: RunRecord) -> Method:
    """The run's method. Raises InputError for one that is unknown here, and for one by import path."""
    if not record.config:
        raise InputError(
            f"{record.run_dir / 'config.yaml'}: missing or empty; it names the method whose votes to recompute"
        )
    found, file = record.config.get("method"), record.run_dir / "config.yaml"
    try:
        setting = check_method(found)
        for name, _ in parts_of(setting):
            if IMPORT_PATH.fullmatch(name):  # a run directory may be somebody else's
                raise InputError(f"method: {name} is code, which is not imported because a run directory names it")
        return methods.method_of(setting)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except ValueError as error:
        raise InputError(f"{file}: method: found {found!r}; {error}") from None


def name_of(item: ScoredGroup) -> str:
    """A group, for people."""
    return f"{shortened(item.group.uid, MAX_EXCERPT)} ({item.group.view}, {item.group.role})"


def _rewards(item: ScoredGroup) -> FloatArray:
    assert item.rewards is not None  # every group of the policy has them (ScoredGroup)
    return item.rewards


def _advantages(item: ScoredGroup, now: GroupReward, by_std: bool) -> FloatArray:
    """Over the rollouts that were trained on, which the dump names; NaN for the others."""
    assert item.advantages is not None
    trained = np.flatnonzero(~np.isnan(item.advantages))
    advantages = np.full_like(item.advantages, np.nan)
    advantages[trained] = replace(now, rewards=_rewards(item)).of_rollouts(trained).advantages_of_group(by_std)
    return advantages


def _gold(item: ScoredGroup) -> str | None:
    """The data set's answer; in dumps that do not have it, the label of a method that labels by it."""
    return item.label if item.ground_truth is None else item.ground_truth


def _as_recorded(item: ScoredGroup, method: Method) -> GroupReward:
    own = getattr(method, "own_advantages", False)
    return GroupReward(item.label, _rewards(item), item.advantages if own else None)


def _response_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "rollout/response_tokens_mean": float(np.mean(lengths)),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/truncated_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "rollout/repeated_ngrams": repeated_ngrams([completion.token_ids for completion in completions]),
    }
