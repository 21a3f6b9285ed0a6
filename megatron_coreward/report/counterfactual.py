"""What another relation of equivalence would have changed in a run, on the rollouts that it sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.errors import InputError
from megatron_coreward.report.recompute import method_of, name_of, recompute_run
from megatron_coreward.report.run_record import RunRecord
from megatron_coreward.rewards.equivalence import AnswerEquivalence, Relation
from megatron_coreward.rewards.methods.base import Method
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.untrusted_text import excerpt


@dataclass(slots=True)
class Counterfactual:
    """What another relation would have changed, in one step or, added up, in a run."""

    groups: int = 0
    rollouts: int = 0
    labels_changed: int = 0  # another answer under the new relation, or a label in place of none
    rewards_changed: int = 0
    reward_recorded: float = 0.0  # sums over rollouts
    reward_now: float = 0.0
    labels_right_recorded: int = 0  # of `labels_judged`, by the new relation
    labels_right_now: int = 0
    labels_judged: int = 0  # groups whose data set answer is in the dump
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be recomputed


def counterfactual(
    record: RunRecord, relation: Relation, steps: range | None = None, max_examples: int = 10
) -> Counterfactual:
    """The rewards of a run under another relation of equivalence, on the rollouts that it sampled.

    Raises:
        InputError: as `replay`, and for a method whose rewards rest on token statistics.
    """
    method = method_of(record)
    if method.needs.token_stats:
        raise InputError(
            f"{record.run_dir}: the rewards of {method.name} rest on token statistics, which are not dumped"
        )
    settings = record.settings("rewards", RewardSettings).model_copy(update={"equivalence": relation})
    total = Counterfactual(notes=_cut_votes(record, method, relation))
    with AnswerEquivalence(relation, settings.comparison_timeout_s, settings.comparison_workers) as equivalence:
        for step, found in recompute_run(record, settings, equivalence, steps, total.notes.append):
            for item, now in zip(found.policy, found.group_rewards, strict=True):
                assert item.rewards is not None
                changed = item.label != now.label and not equivalence.equivalent(item.label, now.label)
                total.groups += 1
                total.rollouts += len(item.rewards)
                total.labels_changed += changed
                moved = np.flatnonzero(item.rewards != now.rewards)
                total.rewards_changed += len(moved)
                total.reward_recorded += float(item.rewards.sum())
                total.reward_now += float(now.rewards.sum())
                if item.ground_truth is not None:
                    total.labels_judged += 1
                    total.labels_right_recorded += equivalence.equivalent(item.label, item.ground_truth)
                    total.labels_right_now += equivalence.equivalent(now.label, item.ground_truth)
                if (changed or len(moved)) and len(total.examples) < max_examples:
                    total.examples.append(_example(step, item, now.label, moved.tolist()))
    return total


def _cut_votes(record: RunRecord, method: Method, relation: Relation) -> list[str]:
    """Of votes that ended before all of their answers were there."""
    used, early_stop = _relation_of(record), (record.config.get("teacher") or {}).get("early_stop", False)
    if relation == used or not method.needs.teacher or not early_stop:
        return []
    return [
        f"with teacher.early_stop a vote of the teacher ended when {used} had decided it. Under {relation} the answers "
        "that were not awaited could have changed it, so labels that come from the teacher are those of the answers "
        "that there are, not of whole groups"
    ]


def _relation_of(record: RunRecord) -> str:
    """The relation of equivalence that the run was made with."""
    return record.settings("rewards", RewardSettings).equivalence


def counterfactual_summary(record: RunRecord, relation: Relation, result: Counterfactual) -> list[str]:
    """What a person reads of another relation."""
    rollouts = max(result.rollouts, 1)
    used = _relation_of(record)
    lines = [
        f"{record.run_dir}: what {relation} would have changed against {used}, on the same rollouts",
        f"  labels      {result.labels_changed:,} of {result.groups:,} groups "
        f"({_share(result.labels_changed, result.groups)})",
        f"  rewards     {result.rewards_changed:,} of {result.rollouts:,} rollouts "
        f"({_share(result.rewards_changed, result.rollouts)})",
        f"  mean reward {result.reward_recorded / rollouts:.4f}, then {result.reward_now / rollouts:.4f}",
    ]
    if result.labels_judged:
        lines.append(
            f"  label accuracy {_share(result.labels_right_recorded, result.labels_judged)}, then "
            f"{_share(result.labels_right_now, result.labels_judged)}, both by {relation}"
        )
    lines += [f"  note: {note}" for note in result.notes]
    if result.examples:
        lines += ["examples:", *(f"  {example}" for example in result.examples)]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _example(step: int, item: ScoredGroup, label: str | None, moved: Sequence[int]) -> str:
    answers = ", ".join(excerpt(item.group.completions[place].answer) for place in moved[:3])
    rewards = f"; {len(moved)} rewards change (answers {answers}{', ...' if len(moved) > 3 else ''})" if moved else ""
    return f"step {step}, {name_of(item)}: label {excerpt(item.label)}, now {excerpt(label)}{rewards}"
