"""The steps of one attempt at a run, in order, with what surrounds each: validation, row of metrics, checkpoint.

Invariants (tests/trainer/test_session.py, tests/e2e/test_resume.py):
  1. The row of a step is on disk before the checkpoint that covers it: a resumed run never lacks one.
  2. A run that is asked to stop saves all that it has done. A step whose update is done is never done again, a step
     whose update has not begun is begun again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_coreward.checkpoint.store import TrainerState
from megatron_coreward.cluster.preemption import Preempted, StopRequest
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollback import Collapsing

GUARD = "guard"  # its state, in a checkpoint
FIRST_ACCURACY = "first_accuracy"
UNFINISHED = "unfinished_row"  # of a checkpoint that was written between a step's update and its validation

Row = dict[str, float]


@dataclass(slots=True)
class Session:
    """What the steps of an attempt work with, and how far they are."""

    config: RunConfig
    run: Trainer
    checkpoints: CheckpointWriter
    stop: StopRequest
    validate: Callable[[PhaseTimer], Row] | None  # None: there is nothing held out
    observe: Callable[[int, Sequence[ScoredGroup]], Row]  # further metrics of a step
    record: Callable[[int, Row], None]
    new_timer: Callable[[], PhaseTimer]
    notify: Callable[[str], None]  # what people should know, now and afterwards
    done: int = 0  # steps whose row is written
    saved: int = 0  # the last step that a checkpoint covers
    skipped: int = 0  # steps in a row without an update
    last_row: Row = field(default_factory=dict)  # of the step that was done last
    first_accuracy: float | None = None  # avg@n (pass@1 without random samples) of the run's first validation

    def resume(self, trainer_state: TrainerState) -> None:
        """Takes over where an earlier attempt stood; the actors have loaded their part."""
        self.run.num_updates, self.run.teacher_updates = trainer_state.num_updates, trainer_state.teacher_updates
        if GUARD in trainer_state.extra:
            self.run.guard.load_state_dict(trainer_state.extra[GUARD])
        self.first_accuracy = trainer_state.extra.get(FIRST_ACCURACY)
        self.done = self.saved = trainer_state.step
        if UNFINISHED in trainer_state.extra:
            row = {k: math.nan if value is None else value for k, value in trainer_state.extra[UNFINISHED].items()}
            self._complete(trainer_state.step, row, self.new_timer())

    def validate_at_start(self) -> None:
        """The row of step 0."""
        if self.validate is not None and self.config.validation.at_start:
            timer = self.new_timer()
            self.record(0, self._validated(timer) | timer.metrics())

    def train(self) -> None:
        """All steps that are left. Raises Preempted, with everything saved, when the run was asked to stop."""
        config, timer = self.config, self.new_timer()
        try:
            for step in range(self.done + 1, config.steps + 1):
                self.stop.check()
                result = self.run.step(step, timer)
                row = self._complete(step, result.metrics | self.observe(step, result.scored), timer)
                timer = self.new_timer()  # the checkpoint's time belongs to the next row: this one is written before it
                with timer.phase("checkpoint"):
                    self.checkpoints.poll()
                    if due(step, config.checkpoint.every, config.steps):
                        self._save(row)
            self.checkpoints.finish()
        except Collapsing:
            self.checkpoints.finish()
            raise
        except Preempted:
            if self.done > self.saved:
                self._save(self.last_row)
            self.checkpoints.finish()
            raise

    def _complete(self, step: int, row: Row, timer: PhaseTimer) -> Row:
        """Validates if it is time, and records the row of a step whose update is done."""
        if self.validate is not None and due(step, self.config.validation.every, self.config.steps):
            try:
                row = row | self._validated(timer)
            except Preempted:
                self.checkpoints.begin(self._trainer_state(step, row, {UNFINISHED: _to_json(row)}))
                self.saved = step
                raise
        decision = self.run.guard.observe(step, row)
        row = row | decision.metrics()
        self.record(step, row | timer.metrics())
        self.done, self.last_row = step, row
        if decision.news:
            self.notify(str(decision))
        if decision.action in ("rollback", "stop"):
            raise Collapsing(decision)
        self.skipped = self.skipped + 1 if row.get("optim/skipped_updates") else 0
        limit = self.config.faults.max_skipped_updates
        if self.skipped > limit:
            raise RunError(
                f"the gradient was not finite in {self.skipped} steps in a row (faults.max_skipped_updates: {limit}); "
                f"the learning rate (actor.lr: {self.config.actor.lr:g}) may be too high"
            )
        return row

    def _validated(self, timer: PhaseTimer) -> Row:
        assert self.validate is not None
        metrics: Row = self.run.with_recovery(partial(self.validate, timer))
        settings = self.config.validation
        key = "val/pass@1" if settings.samples == "greedy" else f"val/avg@{settings.n}"
        first = self.first_accuracy = metrics[key] if self.first_accuracy is None else self.first_accuracy
        if metrics[key] < first - settings.warn_below_start:
            self.notify(
                f"{key} is {metrics[key]:.1%}, and was {first:.1%} at first: training makes the model worse on the "
                "validation questions"
            )
        return metrics

    def _save(self, row: Row) -> None:
        self.checkpoints.begin(self._trainer_state(self.done, row, {}))
        self.saved = self.done

    def _trainer_state(self, step: int, row: Row, more: dict[str, Any]) -> TrainerState:
        extra = {GUARD: self.run.guard.state_dict(), FIRST_ACCURACY: self.first_accuracy} | more
        score = row.get(self.config.checkpoint.best_metric or "", math.nan)
        known = score if math.isfinite(score) else None
        return TrainerState(step, self.run.num_updates, self.run.teacher_updates, known, extra)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    return step == last or (every > 0 and step % every == 0)


def _to_json(row: Row) -> dict[str, float | None]:
    return {key: float(value) if math.isfinite(value) else None for key, value in row.items()}
