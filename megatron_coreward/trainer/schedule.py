"""What is sampled when, and from which weights, if a run is to repeat bit by bit (`rollout.schedule: deterministic`).

A step draws its own rollouts from the weights of the moment, the teacher's before the policy's; every engine has a
fixed share of them. With `rollout.max_staleness: 1` the engines draw a step's rollouts while the actors still learn
from those of the step before: from weights that are one update old, which `loss.mismatch_correction` corrects. The
teacher may label several steps at once (`trainer.label_windows`).

Invariants (tests/trainer/test_schedule.py):
  1. Nothing goes ahead across a checkpoint: what a resumed run draws is what an uninterrupted one drew.
  2. What is drawn is a function of weights, questions and seeds, not of when a result arrived.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.methods.base import Needs
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Rollouts
from megatron_coreward.trainer.label_windows import window_between_checkpoints
from megatron_coreward.trainer.sampling import step_requests, to_groups
from megatron_coreward.types import Completion, Problem, Role, RolloutGroup


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The rollouts of a step that engines are drawing."""

    step: int
    epoch: int  # of the engines: those of an engine that has died since will not come
    finish: Callable[[], list[list[Completion]]] | None  # the policy's; None: they are in the rollout log
    finish_labels: Callable[[], None]  # the teacher's


@dataclass(slots=True)
class RolloutSchedule:
    """The rollouts of a run's steps, in order."""

    config: RunConfig
    needs: Needs
    engines: RolloutEngines
    problems_of: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0
    logged: Callable[[int], bool] = lambda step: False  # whether a step's rollouts are in the rollout log
    _labelled: dict[int, list[RolloutGroup]] = field(default_factory=dict)  # the teacher's, of steps to come
    _in_flight: _InFlight | None = None

    def sample(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """The rollouts of a step: those that are in flight, or drawn now. Those of the next step begin, if they may.

        A step in the rollout log has its rollouts there. Nothing is drawn for it; what later steps need is.

        Args:
            num_updates: optimizer steps that the policy has taken.
        """
        policy: list[RolloutGroup] = []
        if not self.logged(step) or self._to_label(step):
            policy = self.engines.run(lambda: self._take(step, num_updates, timer), timer)
        teacher = self._labelled.pop(step, [])
        if self.config.rollout.max_staleness and step + 1 <= self._ahead_until(step):
            self.engines.run(lambda: self._prefetch(step + 1, num_updates, timer), timer)
        return Rollouts(policy, teacher, self.engines.take_syncs())

    def _take(self, step: int, num_updates: int, timer: PhaseTimer) -> list[RolloutGroup]:
        begun, self._in_flight = self._in_flight, None
        if begun is not None:
            lost = begun.epoch != self.engines.epoch
            unread = begun.finish is None and not self.logged(step)  # it was in the log, and could not be read
            if begun.step != step or lost or unread:
                begun = None
        if begun is None:
            begun = self._draw(step, num_updates, timer)
        with timer.phase("rollout"):
            begun.finish_labels()
            policy = [] if begun.finish is None else begun.finish()
        return self._groups("policy", step, policy) if policy else []

    def _prefetch(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        self._in_flight = self._draw(step, num_updates, timer)

    def _draw(self, step: int, num_updates: int, timer: PhaseTimer) -> _InFlight:
        """Begins the rollouts of a step that are not in the rollout log.

        If the teacher has engines of its own, both are drawn at once; else its own are complete on return.
        """
        finish_labels = self._begin_labels(step, num_updates, timer)
        if self.engines.shared:
            with timer.phase("rollout"):
                finish_labels()
            finish_labels = _nothing
        finish = None
        if not self.logged(step):
            version = self.engines.sync_weights("policy", num_updates, timer)
            finish = self.engines.begin_sampling(self._requests("policy", step), version)
        return _InFlight(step, self.engines.epoch, finish, finish_labels)

    def _begin_labels(self, step: int, num_updates: int, timer: PhaseTimer) -> Callable[[], None]:
        """Begins the teacher's rollouts of the steps that begin with this one, if a window of them begins; the result
        waits for them.

        A step in the rollout log has its own; those after it in its window are drawn here, as they were before.
        """
        steps = self._to_label(step)
        if not steps:
            return _nothing
        version = self.engines.sync_weights("teacher", num_updates, timer)
        asked = {s: self._requests("teacher", s) for s in steps}
        draw = self.engines.begin_sampling([r for of_step in asked.values() for r in of_step], version)

        def finish() -> None:
            answers = iter(draw())
            for s, requests in asked.items():
                self._labelled[s] = self._groups("teacher", s, [next(answers) for _ in requests])

        return finish

    def _groups(self, role: Role, step: int, completions: Sequence[Sequence[Completion]]) -> list[RolloutGroup]:
        return to_groups(self.problems_of(step - 1), self.needs.sampled_views(role), role, completions)

    def _to_label(self, step: int) -> list[int]:
        """The steps whose teacher rollouts are drawn when this one's are due."""
        if not self.needs.teacher:
            return []

        def lacking(s: int) -> bool:
            return s not in self._labelled and not self.logged(s)

        lookahead, every = self.config.teacher.lookahead, self.config.checkpoint.every
        return window_between_checkpoints(step, lookahead, self._ahead_until(step), every, lacking)

    def _ahead_until(self, step: int) -> int:
        """The last step that may be drawn for while this one is at hand."""
        every = self.config.checkpoint.every
        covered = step + -step % every if every else self.config.steps
        return min(covered, self.config.steps)

    def _requests(self, role: Role, step: int) -> list[SamplingRequest]:
        return step_requests(self.config, role, self.needs.sampled_views(role), step, self.problems_of(step - 1))


def _nothing() -> None:
    pass
