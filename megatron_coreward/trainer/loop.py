"""Training by Co-rewarding, in the order of the paper (arXiv 2508.00410, algorithms 1 and 2).

A step is the same for every method; it branches on what the method needs, never on what it is called. How rollouts are
collected is in `trainer.experience`.

Invariants (tests/trainer/test_train.py, tests/e2e/test_faults.py):
  1. The row of a step is on disk before the checkpoint that covers it: a resumed run never lacks one.
  2. A run that is asked to stop saves all that it has done. A step whose update is done is never done again; a step
     whose update has not begun is begun again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from megatron_coreward.algorithms.ema_schedule import teacher_decay
from megatron_coreward.checkpoint.store import TrainerState
from megatron_coreward.cluster.garbage_collection import garbage_collection_paused
from megatron_coreward.cluster.preemption import Preempted, StopRequest
from megatron_coreward.cluster.worker_group import Workers
from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.guard import Guard
from megatron_coreward.rewards.methods.base import Needs
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer import step_metrics
from megatron_coreward.trainer.batch import mini_batches, to_batch
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Experience
from megatron_coreward.trainer.rollback import Collapsing
from megatron_coreward.trainer.step_metrics import Updates
from megatron_coreward.types import Sequences, TokenStats, TrainBatch

Row = dict[str, float]


class TrainingActors(Workers, Protocol):
    """What a step needs of the actors (`cluster.actor_group.ActorGroup`)."""

    def token_stats(self, sequences: Sequences, weights: Any, temperature: float, statistics: bool) -> TokenStats: ...
    def update(self, batch: TrainBatch) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind: every group with its rewards, and one flat row of metrics."""

    scored: list[ScoredGroup]
    metrics: Row


@dataclass(slots=True, kw_only=True)
class Trainer:
    """A run: its state, its step, and what comes between steps."""

    config: RunConfig
    needs: Needs  # of the method
    actors: TrainingActors
    collect: Callable[[int, int, PhaseTimer], Experience]  # step, updates so far (`Collector.collect`)
    checkpoints: CheckpointWriter
    state: TrainerState = field(default_factory=lambda: TrainerState(0, 0))
    guard: Guard = field(default_factory=lambda: Guard(GuardSettings()))
    stop: StopRequest = field(default_factory=StopRequest)
    validate: Callable[[int, PhaseTimer], Row] | None = None  # updates so far; None: nothing is held out
    draw_anchors: Callable[[int, int, PhaseTimer], Row] = lambda step, num_updates, timer: {}  # if it is time
    observe: Callable[[int, Sequence[ScoredGroup]], Row] = lambda step, scored: {}  # further metrics of a step
    questions: Callable[[int], dict[str, Any] | None] = lambda step: None  # their state after a step, for checkpoints
    record: Callable[[int, Row], None] = lambda step, row: None
    new_timer: Callable[[], PhaseTimer] = PhaseTimer
    notify: Callable[[str], None] = lambda text: None  # what people should know, now and afterwards

    @garbage_collection_paused()
    def step(self, step: int, timer: PhaseTimer) -> StepResult:
        """One step of the run, counted from 1."""
        decay = self.update_ema_teacher(step, timer)
        experience = self.collect(step, self.state.num_updates, timer)  # sample teacher and policy, score, advantages
        updates = self.update(experience, timer)
        metrics = step_metrics.of_step(self.config, experience, updates, timer.seconds)
        return StepResult(experience.scored, metrics | ({} if decay is None else {"teacher/decay": decay}))

    def update_ema_teacher(self, step: int, timer: PhaseTimer) -> float | None:
        """teacher <- decay * teacher + (1 - decay) * policy (Eq. 11); returns the decay, None without a teacher."""
        if not self.needs.teacher:
            return None
        settings = self.config.teacher
        decay = teacher_decay(step - 1, self.config.steps, settings.decay_start, settings.decay_end)
        if self.guard.teacher_frozen:
            decay = 1.0
        if self.state.teacher_updates < step:  # else a run was stopped within the step, after its EMA update
            with timer.phase("teacher_ema"):
                self.actors.call("update_ema_teacher", decay)
            self.state = replace(self.state, teacher_updates=step)
        return decay

    def update(self, experience: Experience, timer: PhaseTimer) -> Updates:
        """PPO-clip with KL to the reference: one optimizer step on the batch, or several on parts of it."""
        loss, max_tokens = self.config.loss, self.config.rollout.max_response_tokens
        kl_coef = (loss.kl_coef or 0.0) * self.guard.kl_factor
        reference = old = None
        with timer.phase("token_stats"):
            if loss.updates_per_batch > 1:  # with one update a batch, the current log-probs are the old ones
                old = experience.token_stats or self._logprobs(experience.sequences, "policy")
            if kl_coef:
                held_to = "teacher" if loss.kl_reference == "teacher" else "reference"
                reference = self._logprobs(experience.sequences, held_to)
        with timer.phase("update"):
            groups = experience.trained
            batch = to_batch(
                experience.sequences, groups, experience.advantages, loss, max_tokens, old, reference, kl_coef
            )
            reports = []
            for part in mini_batches(batch, groups, loss, max_tokens):
                reports.append(self.actors.update(part))
                self.state = replace(self.state, num_updates=self.state.num_updates + 1)
        return Updates(reports, kl_coef)

    def _logprobs(self, sequences: Sequences, weights: str) -> TokenStats:
        return self.actors.token_stats(sequences, weights, self.config.rollout.temperature, False)

    def train(self) -> None:
        """All steps that are left. Raises Preempted, with everything saved, when the run was asked to stop."""
        config = self.config
        try:
            self._begin()
            timer = self.new_timer()
            for step in range(self.state.step + 1, config.steps + 1):
                self.stop.check()
                result = self.step(step, timer)
                self._complete(step, result.metrics | self.observe(step, result.scored), timer)
                timer = self.new_timer()  # the checkpoint's time belongs to the next row: this one is written before it
                with timer.phase("checkpoint"):
                    self.checkpoints.poll()
                    if due(step, config.checkpoint.every, config.steps):
                        self._save()
            self.checkpoints.finish()
        except Collapsing:
            self.checkpoints.finish()
            raise
        except Preempted:
            if self.state.step > self.checkpoints.last_step:
                self._save()
            self.checkpoints.finish()
            raise
        except RunError as error:
            if isinstance(error.__cause__, OSError):  # a full disk, say: the ranks are well
                self.checkpoints.finish_or_discard()
            raise

    def _begin(self) -> None:
        """The row of step 0, or the one that an attempt before had begun."""
        timer = self.new_timer()
        if self.state.unfinished_row is not None:
            row = {k: math.nan if value is None else value for k, value in self.state.unfinished_row.items()}
            self._complete(self.state.step, row, timer)
            if self.state.step == self.config.steps:  # no later checkpoint comes, and this one has half a row
                self._save()
        elif self.state.step == 0:
            row = self.draw_anchors(0, self.state.num_updates, timer)
            if self.validate is not None and self.config.validation.at_start:
                row = row | self._validated(timer)
            if row:
                self.record(0, row | timer.metrics())

    def _complete(self, step: int, row: Row, timer: PhaseTimer) -> None:
        """Draws what is drawn beside training, if it is time, and records the row of a step whose update is done."""
        try:
            row = row | self.draw_anchors(step, self.state.num_updates, timer)
            if self.validate is not None and due(step, self.config.validation.every, self.config.steps):
                row = row | self._validated(timer)
        except Preempted:
            self.state = replace(self.state, step=step, score=self._score(row), unfinished_row=_to_json(row))
            self._save()
            raise
        decision = self.guard.observe(step, row)
        row = row | decision.metrics()
        self.record(step, row | timer.metrics())
        limits = [row["sync/canary_limit"]] if "sync/canary_limit" in row else []
        if self.state.canary_limit is not None and self.state.canary_allowed == self.config.sync.max_logprob_gap:
            limits.append(self.state.canary_limit)  # another role's engines may have found it, at an earlier step
        self.state = replace(
            self.state,
            step=step,
            score=self._score(row),
            skipped_steps=self.state.skipped_steps + 1 if row.get("optim/skipped_updates") else 0,
            unfinished_row=None,
            canary_limit=max(limits, default=None),
            canary_allowed=self.config.sync.max_logprob_gap,
        )
        if decision.news:
            self.notify(str(decision))
        if decision.action in ("rollback", "stop"):
            raise Collapsing(decision)
        skipped, limit = self.state.skipped_steps, self.config.faults.max_skipped_updates
        if skipped > limit:
            raise RunError(
                f"the gradient was not finite in {skipped} steps in a row (faults.max_skipped_updates: {limit}); "
                f"the learning rate (actor.lr: {self.config.actor.lr:g}) may be too high"
            )

    def _validated(self, timer: PhaseTimer) -> Row:
        assert self.validate is not None
        metrics = self.validate(self.state.num_updates, timer)
        settings = self.config.validation
        key = "val/pass@1" if settings.samples == "greedy" else f"val/avg@{settings.n}"
        comparable = self.state.first_metric in (key, None)  # a resumed run may validate in another way
        known = self.state.first_accuracy if comparable else None
        first = metrics[key] if known is None else known
        self.state = replace(self.state, first_accuracy=first, first_metric=key)
        if metrics[key] < first - settings.warn_below_start:
            self.notify(
                f"{key} is {metrics[key]:.1%}, and was {first:.1%} at first: training makes the model worse on the "
                "validation questions"
            )
        return metrics

    def _score(self, row: Row) -> float | None:
        score = row.get(self.config.checkpoint.best_metric or "", math.nan)
        return score if math.isfinite(score) else None

    def _save(self) -> None:
        metric = None if self.state.score is None else self.config.checkpoint.best_metric
        self.checkpoints.begin(
            replace(
                self.state,
                score_metric=metric,
                guard=self.guard.state_dict(),
                questions=self.questions(self.state.step),
            )
        )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps, and at the end, happens after this one."""
    return step == last or (every > 0 and step % every == 0)


def _to_json(row: Row) -> dict[str, float | None]:
    return {key: float(value) if math.isfinite(value) else None for key, value in row.items()}
