"""`replay`: does what a run recorded follow from what it sampled? Recomputed from its dumps, without an engine."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.guard import replay_rows
from megatron_coreward.report.recompute import Recomputed, method_of, name_of, recompute_run
from megatron_coreward.report.run_record import RunRecord
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import Method
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.jsonl import Row
from megatron_coreward.telemetry.untrusted_text import excerpt

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
        recorded, recomputed = excerpt(self.recorded), excerpt(self.recomputed)
        return f"step {self.step}, {self.where}: {self.what} {recorded} was recorded, now {recomputed}"


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
    method, settings = method_of(record), record.settings("rewards", RewardSettings)
    result = Replay(notes=_limits(method))
    rows = {int(row[keys.STEP] or 0): row for row in record.rows}
    with AnswerEquivalence(
        settings.equivalence, settings.comparison_timeout_s, settings.comparison_workers
    ) as equivalence:
        for step, found in recompute_run(record, settings, equivalence, steps, result.notes.append):
            result.steps += 1
            _compare(result, _group_differences(step, found))
            if step in rows:
                _compare(result, _metric_differences(step, rows[step], found.metrics))
            else:
                result.notes.append(f"step {step} has rollouts and no row of metrics: the run ended within it")
        if equivalence.timeouts:
            result.notes.append(
                f"{equivalence.timeouts} comparisons exceeded rewards.comparison_timeout_s and count as not the same"
            )
    _compare(result, _guard_differences(result, record))
    return result


def _limits(method: Method) -> list[str]:
    if method.needs.token_stats:
        return [f"the rewards of {method.name} rest on token statistics, which are not dumped: taken as recorded"]
    if method.needs.ground_truth:
        return [f"the labels of {method.name} are the data set's answers: taken as recorded"]
    return []


def _compare(result: Replay, pairs: Iterable[tuple[Difference, bool]]) -> None:
    for candidate, equal in pairs:
        result.compared[candidate.what] += 1
        if not equal:
            result.differences.append(candidate)


def _group_differences(step: int, found: Recomputed) -> Iterator[tuple[Difference, bool]]:
    for item, answers in zip(found.recorded, found.answers, strict=True):
        for place, (completion, now) in enumerate(zip(item.group.completions, answers, strict=True), start=1):
            where = f"{name_of(item)}, rollout {place}"
            yield Difference(step, where, "answer", completion.answer, now), completion.answer == now
    for item, group_reward, advantages in zip(found.policy, found.group_rewards, found.advantages, strict=True):
        yield Difference(step, name_of(item), "label", item.label, group_reward.label), item.label == group_reward.label
        for what, recorded, values in (
            ("reward", item.rewards, group_reward.rewards),
            ("advantage", item.advantages, advantages),
        ):
            assert recorded is not None
            for place, (then, now) in enumerate(zip(recorded.tolist(), values.tolist(), strict=True), start=1):
                yield Difference(step, f"{name_of(item)}, rollout {place}", what, then, now), _close(then, now)


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
    if recorded is None or math.isnan(recorded):
        return recorded is not None and math.isnan(now)
    return math.isclose(recorded, now, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def summary(record: RunRecord, result: Replay, max_differences: int = 10) -> list[str]:
    """What a person reads of a replay."""
    lines = [f"{record.run_dir}: {method_of(record).name}, {result.steps} steps recomputed"]
    wrong = Counter(difference.what for difference in result.differences)
    for what, number in result.compared.items():
        graded = "all as recorded" if not wrong[what] else f"{wrong[what]} differ"
        lines.append(f"  {what + 's' if what != 'guard' else 'guard decisions':<16} {number:>9,}  {graded}")
    lines += [f"  note: {note}" for note in result.notes]
    if result.differences:
        lines.append("first differences:")
        lines += [f"  {difference}" for difference in result.differences[:max_differences]]
        if (more := len(result.differences) - max_differences) > 0:
            lines.append(f"  and {more:,} more")
    return lines
