"""`replay`: does what a run recorded follow from what it sampled? Recomputed from its dumps, without an engine.

With another relation than the run's it answers a different question: what would that relation have changed?
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.errors import InputError
from megatron_coreward.guard import replay_rows
from megatron_coreward.report.recompute import Recomputed, recompute_step
from megatron_coreward.report.run_record import RunRecord
from megatron_coreward.rewards.equivalence import Judge, Relation
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rewards.methods.base import Method
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.jsonl import Row
from megatron_coreward.telemetry.rollout_dump import JudgedGroup, read_rollouts

# Sums of the same numbers may differ in their last bits from one machine to another.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that comes out otherwise than it was recorded."""

    step: int
    where: str  # which group and rollout, or which metric
    what: str  # answer | label | reward | advantage | metric | guard
    recorded: object
    recomputed: object

    def __str__(self) -> str:
        return f"step {self.step}, {self.where}: {self.what} {self.recorded!r} was recorded, now {self.recomputed!r}"


@dataclass(slots=True)
class Replay:
    """What was compared, and what differs."""

    steps: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be recomputed, and why

    @property
    def equal(self) -> bool:
        return not self.differences


def replay(record: RunRecord, steps: range | None = None) -> Replay:
    """Recomputes the run under its own settings and compares.

    Args:
        steps: only these; None: every step with a dump. The guard is always replayed from the first step on.

    Raises:
        InputError: the run left no rollouts, or its method or settings are unknown here.
    """
    method, settings = _method(record), record.settings("rewards", RewardSettings)
    result = Replay(notes=_limits(method))
    rows = {int(row[keys.STEP] or 0): row for row in record.rows}
    with Judge(settings.equivalence, settings.judge_timeout_s) as judge:
        for step, judged in _dumps(record, steps):
            found = recompute_step(judged, method, settings, judge)
            result.steps += 1
            _compare(result, _group_differences(step, judged, found))
            if step in rows:
                _compare(result, _metric_differences(step, rows[step], found.metrics))
            else:
                result.notes.append(f"step {step} has rollouts and no row of metrics: the run ended within it")
        if judge.timeouts:
            result.notes.append(f"{judge.timeouts} comparisons ran over rewards.judge_timeout_s, as not the same")
    _compare(result, _guard_differences(result, record))
    return result


@dataclass(slots=True)
class WhatIf:
    """What another relation would have changed, in one step or, added up, in a run."""

    groups: int = 0
    rollouts: int = 0
    labels_changed: int = 0  # another answer under the new relation, or a label where there was none
    rewards_changed: int = 0
    reward_recorded: float = 0.0  # sums over rollouts
    reward_now: float = 0.0
    labels_right_recorded: int = 0  # of `labels_judged`, by the new relation
    labels_right_now: int = 0
    labels_judged: int = 0  # groups whose data set answer is in the dump
    examples: list[str] = field(default_factory=list)


def what_if(record: RunRecord, relation: Relation, steps: range | None = None, max_examples: int = 10) -> WhatIf:
    """The rewards of a run under another relation of equivalence, on the rollouts that it sampled.

    Raises:
        InputError: as `replay`, and for a method whose rewards do not depend on the relation.
    """
    method = _method(record)
    if method.needs.token_stats:
        raise InputError(f"{record.run_dir}: the rewards of {method.name} do not depend on which answers are equivalent")
    settings = record.settings("rewards", RewardSettings).model_copy(update={"equivalence": relation})
    total = WhatIf()
    with Judge(relation, settings.judge_timeout_s) as judge:
        for step, judged in _dumps(record, steps):
            found = recompute_step(judged, method, settings, judge)
            for item, now in zip(found.policy, found.judgements, strict=True):
                assert item.rewards is not None
                changed = item.label != now.label and not judge.equivalent(item.label, now.label)
                total.groups += 1
                total.rollouts += len(item.rewards)
                total.labels_changed += changed
                moved = np.flatnonzero(item.rewards != now.rewards)
                total.rewards_changed += len(moved)
                total.reward_recorded += float(item.rewards.sum())
                total.reward_now += float(now.rewards.sum())
                if item.gold is not None:
                    total.labels_judged += 1
                    total.labels_right_recorded += judge.equivalent(item.label, item.gold)
                    total.labels_right_now += judge.equivalent(now.label, item.gold)
                if (changed or len(moved)) and len(total.examples) < max_examples:
                    total.examples.append(_example(step, item, now.label, moved.tolist()))
    return total


def _method(record: RunRecord) -> Method:
    name = record.config.get("method")
    if name not in METHODS:
        raise InputError(f"{record.run_dir / 'config.yaml'}: method: found {name!r}; allowed: {', '.join(METHODS)}")
    return METHODS[name]


def _limits(method: Method) -> list[str]:
    if method.needs.token_stats:
        return [f"the rewards of {method.name} rest on token statistics, which are not dumped: taken as recorded"]
    if method.needs.gold:
        return [f"the labels of {method.name} are the data set's answers: taken as recorded"]
    return []


def _dumps(record: RunRecord, steps: range | None) -> Iterator[tuple[int, list[JudgedGroup]]]:
    wanted = [step for step in record.dumps if steps is None or step in steps]
    if not wanted:
        have = f"steps {min(record.dumps)} to {max(record.dumps)} have some" if record.dumps else "there are none"
        raise InputError(
            f"{record.run_dir / 'rollouts'}: no rollouts to recompute from ({have}); "
            "a run keeps them under telemetry.dump_rollouts"
        )
    for step in wanted:
        yield step, read_rollouts(record.dumps[step])


def _compare(result: Replay, pairs: Iterable[tuple[Difference, bool]]) -> None:
    for candidate, equal in pairs:
        result.compared[candidate.what] += 1
        if not equal:
            result.differences.append(candidate)


def _group_differences(
    step: int, judged: Sequence[JudgedGroup], found: Recomputed
) -> Iterator[tuple[Difference, bool]]:
    for item, answers in zip(judged, found.answers, strict=True):
        for place, (completion, now) in enumerate(zip(item.group.completions, answers, strict=True), start=1):
            where = f"{_name(item)}, rollout {place}"
            yield Difference(step, where, "answer", completion.answer, now), completion.answer == now
    for item, judgement, advantages in zip(found.policy, found.judgements, found.advantages, strict=True):
        yield Difference(step, _name(item), "label", item.label, judgement.label), item.label == judgement.label
        for what, recorded, values in (
            ("reward", item.rewards, judgement.rewards),
            ("advantage", item.advantages, advantages),
        ):
            assert recorded is not None
            for place, (then, now) in enumerate(zip(recorded.tolist(), values.tolist(), strict=True), start=1):
                yield Difference(step, f"{_name(item)}, rollout {place}", what, then, now), _close(then, now)


def _metric_differences(step: int, row: Row, metrics: Mapping[str, float]) -> Iterator[tuple[Difference, bool]]:
    for key, now in metrics.items():
        if key in row:
            yield Difference(step, key, "metric", row[key], now), _close(row[key], now)


def _guard_differences(result: Replay, record: RunRecord) -> Iterator[tuple[Difference, bool]]:
    settings = record.settings("guard", GuardSettings)
    recorded = {int(row[keys.STEP] or 0): row for row in record.steps}
    if not any(key.startswith("guard/") for row in recorded.values() for key in row):
        result.notes.append("the run recorded no decisions of a guard")
        return
    for step, decision in replay_rows(settings, record.steps):
        for key, now in decision.metrics().items():
            if key in recorded[step]:
                yield Difference(step, key, "guard", recorded[step][key], now), _close(recorded[step][key], now)


def _close(recorded: float | None, now: float) -> bool:
    return recorded is not None and math.isclose(recorded, now, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _name(item: JudgedGroup) -> str:
    return f"{item.group.uid} ({item.group.view}, {item.group.role})"


def _example(step: int, item: JudgedGroup, label: str | None, moved: Sequence[int]) -> str:
    answers = ", ".join(repr(item.group.completions[place].answer) for place in moved[:3])
    rewards = f"; {len(moved)} rewards change (answers {answers}{', ...' if len(moved) > 3 else ''})" if moved else ""
    return f"step {step}, {_name(item)}: label {item.label!r}, now {label!r}{rewards}"


def summary(record: RunRecord, result: Replay, max_differences: int = 10) -> list[str]:
    """What a person reads of a replay."""
    lines = [f"{record.run_dir}: {record.config.get('method')}, {result.steps} steps recomputed"]
    wrong = Counter(difference.what for difference in result.differences)
    for what, number in result.compared.items():
        verdict = "all as recorded" if not wrong[what] else f"{wrong[what]} differ"
        lines.append(f"  {what + 's' if what != 'guard' else 'guard decisions':<16} {number:>9,}  {verdict}")
    lines += [f"  note: {note}" for note in result.notes]
    if result.differences:
        lines.append("first differences:")
        lines += [f"  {difference}" for difference in result.differences[:max_differences]]
        if (more := len(result.differences) - max_differences) > 0:
            lines.append(f"  and {more:,} more")
    return lines


def what_if_summary(record: RunRecord, relation: Relation, result: WhatIf) -> list[str]:
    """What a person reads of another relation."""
    rollouts = max(result.rollouts, 1)
    used: Any = (record.config.get("rewards") or {}).get("equivalence", "exact")
    lines = [
        f"{record.run_dir}: what {relation} would have changed against {used}, on the same rollouts",
        f"  labels      {result.labels_changed:,} of {result.groups:,} groups ({_share(result.labels_changed, result.groups)})",
        f"  rewards     {result.rewards_changed:,} of {result.rollouts:,} rollouts "
        f"({_share(result.rewards_changed, result.rollouts)})",
        f"  mean reward {result.reward_recorded / rollouts:.4f}, then {result.reward_now / rollouts:.4f}",
    ]
    if result.labels_judged:
        lines.append(
            f"  label accuracy {_share(result.labels_right_recorded, result.labels_judged)}, then "
            f"{_share(result.labels_right_now, result.labels_judged)}, both by {relation}"
        )
    if result.examples:
        lines += ["examples:", *(f"  {example}" for example in result.examples)]
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
