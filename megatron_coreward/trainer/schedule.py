"""What is sampled when, and from which weights.

A step draws its own rollouts from the weights of the moment, the teacher's before the policy's. Two settings let work
go ahead of the step that needs it, for speed:

  rollout.max_staleness = 1   engines draw a step's rollouts while the actors still learn from those of the step
                              before: from weights that are one update old, which `loss.mismatch_correction` corrects.
  teacher.lookahead = L       the teacher, which moves slowly, labels up to L + 1 steps at once: one weight sync
                              instead of L + 1.

Invariants (tests/trainer/test_schedule.py):
  1. Nothing goes ahead across a checkpoint: what a resumed run draws is what an uninterrupted one drew.
  2. What is drawn is a function of weights, questions and seeds, not of when a result arrived.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_coreward.cluster.colocation import GpuHandoff
from megatron_coreward.cluster.weight_sync import SyncReport, WeightSync
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.methods.base import Needs
from megatron_coreward.rollout.engine import Sample, SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.sampling import SamplingEngines, requests_for, to_groups
from megatron_coreward.types import Problem, Role, RolloutGroup, WeightVersion

Rollouts = dict[Role, list[RolloutGroup]]


class RolloutEngines(SamplingEngines, Protocol):
    """What a schedule needs of the engines (`cluster.groups.EngineGroup`)."""

    def begin(self, requests: Sequence[SamplingRequest], expected_version: int) -> Callable[[], list[list[Sample]]]: ...


@dataclass(slots=True)
class _InFlight:
    """The policy's rollouts of a step that engines are drawing."""

    step: int
    engine_epoch: int  # of the engines: those of an engine that has died since will not come
    finish: Callable[[], list[list[Sample]]]


@dataclass(slots=True)
class RolloutSchedule:
    """The rollouts of a run's steps, in order."""

    config: RunConfig
    needs: Needs
    engines: RolloutEngines
    sync: WeightSync
    problems_of: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0
    recorded: Callable[[int], bool]  # whether a step's rollouts are in the journal
    gpu_handoff: GpuHandoff
    with_recovery: Callable[[Callable[[], Any]], Any]
    syncs: list[SyncReport] = field(default_factory=list)  # since they were taken last
    _labelled: dict[int, list[RolloutGroup]] = field(default_factory=dict)  # the teacher's, of steps to come
    _in_flight: _InFlight | None = None

    def take(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """The rollouts of a step: those that were begun, or drawn now. Those in the journal are left out.

        Args:
            num_updates: optimizer steps that the policy has taken.
        """
        policy: list[RolloutGroup] = []
        if not self.recorded(step) or self._to_label(step):
            policy = self.with_recovery(lambda: self._take(step, num_updates, timer))
        return {"teacher": self._labelled.pop(step, []), "policy": policy}

    def begin(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Lets the engines begin with a step's rollouts, if they may go ahead; `take` waits for them."""
        if self.config.rollout.max_staleness and step <= self._ahead_until(step - 1):
            self.with_recovery(lambda: self._begin(step, num_updates, timer))

    def sync_weights(self, role: Role, num_updates: int, timer: PhaseTimer) -> None:
        """Brings a role's present weights to the engines, unless they hold them already."""
        with timer.phase("sync"):
            report = self.sync.sync_weights(role, num_updates)
        if report is not None:
            self.syncs.append(report)

    def take_syncs(self) -> list[SyncReport]:
        """The publications since this was asked last."""
        syncs, self.syncs = self.syncs, []
        return syncs

    def _take(self, step: int, num_updates: int, timer: PhaseTimer) -> list[RolloutGroup]:
        begun, self._in_flight = self._in_flight, None
        if begun is None or begun.step != step or begun.engine_epoch != self.sync.engine_epoch:
            with self.gpu_handoff(timer):
                begun = self._draw(step, num_updates, timer)
                return self._finish(begun, timer)
        return self._finish(begun, timer)

    def _begin(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        self._in_flight = self._draw(step, num_updates, timer)

    def _finish(self, begun: _InFlight | None, timer: PhaseTimer) -> list[RolloutGroup]:
        if begun is None:
            return []
        with timer.phase("rollout"):
            return self._groups("policy", begun.step, begun.finish())

    def _draw(self, step: int, num_updates: int, timer: PhaseTimer) -> _InFlight | None:
        """The teacher's rollouts, complete, and the beginning of the policy's; None if these are in the journal."""
        self._label(step, num_updates, timer)
        if self.recorded(step):
            return None
        self.sync_weights("policy", num_updates, timer)
        version = WeightVersion("policy", num_updates).number
        finish = self.engines.begin(self._requests("policy", step), version)
        return _InFlight(step, self.sync.engine_epoch, finish)

    def _label(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Draws the teacher's rollouts of the steps that begin with this one, where a window of them begins.

        A step in the journal has its own; those behind it in its window are drawn here, as they were before.
        """
        steps = self._to_label(step)
        if not steps:
            return
        self.sync_weights("teacher", num_updates, timer)
        version = WeightVersion("teacher", num_updates).number
        asked = {s: self._requests("teacher", s) for s in steps}
        with timer.phase("rollout"):
            answers = iter(self.engines.begin([r for of_step in asked.values() for r in of_step], version)())
        for s, requests in asked.items():
            own = [next(answers) for _ in requests]
            self._labelled[s] = self._groups("teacher", s, own)

    def _groups(self, role: Role, step: int, answers: Sequence[Sequence[Sample]]) -> list[RolloutGroup]:
        problems, forms = self.problems_of(step - 1), self.config.rewards.answer_formats
        return to_groups(problems, self.needs.sampled_views(role), role, answers, forms)

    def _to_label(self, step: int) -> list[int]:
        """The steps whose teacher rollouts are drawn when this one's are due."""
        if not self.needs.teacher:
            return []

        def lacking(s: int) -> bool:
            return s not in self._labelled and not self.recorded(s)

        every, lookahead = self.config.checkpoint.every, self.config.teacher.lookahead
        after_checkpoint = (step - 1) % every if every else step - 1
        if after_checkpoint % (lookahead + 1) and not lacking(step):
            return []  # within a window that is labelled
        return [s for s in range(step, min(step + lookahead, self._ahead_until(step)) + 1) if lacking(s)]

    def _ahead_until(self, step: int) -> int:
        """The last step that may be drawn for while this one is at hand."""
        every = self.config.checkpoint.every
        covered = step + -step % every if every else self.config.steps
        return min(covered, self.config.steps)

    def _requests(self, role: Role, step: int) -> list[SamplingRequest]:
        config = self.config
        return requests_for(
            self.problems_of(step - 1),
            self.needs.sampled_views(role),
            role,
            n=config.teacher.n if role == "teacher" else config.rollout.n,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_response_tokens,
            step=step,
            seed=config.seed,
        )
