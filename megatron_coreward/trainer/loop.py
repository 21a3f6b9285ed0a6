"""One training step of Co-rewarding, in the order of the paper (arXiv 2508.00410, algorithms 1 and 2):

    teacher EMA -> problems -> publish weights -> rollouts -> token statistics -> rewards -> advantages -> update

The step is the same for every method. It branches on what the method needs, never on what it is called.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_coreward.algorithms.advantages import group_advantages
from megatron_coreward.algorithms.ema_schedule import teacher_decay
from megatron_coreward.cluster.colocation import GpuHandoff, no_handoff
from megatron_coreward.cluster.weight_sync import WeightSync
from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.guard import Guard
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward, Method
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer import step_metrics
from megatron_coreward.trainer.batch import mini_batches, to_batch, to_sequences
from megatron_coreward.trainer.garbage_collection import garbage_collection_paused
from megatron_coreward.trainer.rollout_log import LoggedStep, RolloutLog
from megatron_coreward.trainer.schedule import RolloutEngines, RolloutSchedule
from megatron_coreward.types import FloatArray, Problem, RolloutGroup, Sequences, TokenStats, TrainBatch, WeightVersion


class TrainingActors(Protocol):
    """What a step needs of the actors (`cluster.groups.ActorGroup`)."""

    def update_ema_teacher(self, decay: float) -> None: ...
    def token_stats(self, sequences: Sequences, weights: Any, temperature: float) -> TokenStats: ...
    def update(self, batch: TrainBatch) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind: every group with its judgement, and one flat row of metrics."""

    scored: list[ScoredGroup]
    metrics: dict[str, float]


@dataclass(slots=True)
class Trainer:
    """The parts of a run, and the counters that training advances."""

    config: RunConfig
    method: Method
    actors: TrainingActors
    engines: RolloutEngines
    sync: WeightSync
    equivalence: AnswerEquivalence
    problems_of: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0
    guard: Guard = field(default_factory=lambda: Guard(GuardSettings()))
    rollout_log: RolloutLog | None = None  # keeps what a step has sampled, and gives it to a run that died in it
    gpu_handoff: GpuHandoff = no_handoff  # what surrounds publishing and sampling where engines share the actors' GPUs
    with_recovery: Callable[[Callable[[], Any]], Any] = lambda ask: ask()  # asks engines again after one has died
    num_updates: int = 0  # optimizer steps so far
    teacher_updates: int = 0  # the last step whose EMA the teacher has taken
    schedule: RolloutSchedule = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = RolloutSchedule(
            config=self.config,
            needs=self.method.needs,
            engines=self.engines,
            sync=self.sync,
            problems_of=self.problems_of,
            recorded=lambda step: self.rollout_log is not None and self.rollout_log.has(step),
            gpu_handoff=self.gpu_handoff,
            with_recovery=self.with_recovery,
        )

    @garbage_collection_paused()
    def step(self, number: int, timer: PhaseTimer) -> StepResult:
        """Step `number` of the run, counted from 1."""
        config, needs = self.config, self.method.needs
        decay = teacher_decay(number - 1, config.steps, config.teacher.decay_start, config.teacher.decay_end)
        if self.guard.teacher_frozen:
            decay = 1.0
        # It has moved already where a run was stopped within the step.
        if needs.teacher and self.teacher_updates < number:
            with timer.phase("teacher_ema"):
                self.actors.update_ema_teacher(decay)
            self.teacher_updates = number

        problems = self.problems_of(number - 1)
        recorded = self._recorded(number, problems)
        rollouts = self.schedule.take(number, self.num_updates, timer)
        self.schedule.begin(number + 1, self.num_updates, timer)  # where rollouts may go ahead
        syncs = self.schedule.take_syncs()
        if recorded is not None:
            rollouts, syncs = recorded.rollouts, recorded.syncs
        groups = rollouts["policy"]

        kl_coef = (config.loss.kl_coef or 0.0) * self.guard.kl_factor
        with timer.phase("token_stats"):
            sequences = to_sequences(groups)
            old = self._stats(sequences, "policy") if needs.token_stats or config.loss.updates_per_batch > 1 else None
            reference = self._stats(sequences, self.reference) if kl_coef else None

        with timer.phase("rewards"):
            context = BatchRewardContext(
                needs,
                self.equivalence,
                policy_groups=groups,
                teacher_groups=rollouts["teacher"],
                token_stats=old,
                ground_truths=self._ground_truths(problems) if needs.ground_truth else None,
                min_margin=config.rewards.min_margin,
            )
            group_rewards = (
                recorded.group_rewards if recorded else [self.method.score(group, context) for group in groups]
            )
            advantages = [group_advantages(group_reward.rewards) for group_reward in group_rewards]

        scored = _scored(groups, group_rewards, advantages, rollouts["teacher"], self._ground_truths(problems))
        if self.rollout_log is not None and recorded is None:
            self.rollout_log.write(number, scored, syncs)

        with timer.phase("update"):
            several = config.loss.updates_per_batch > 1
            batch = to_batch(
                sequences,
                groups,
                advantages,
                config.loss,
                config.rollout.max_response_tokens,
                old=old if several else None,  # with one update a batch, the current log-probs are the old ones
                reference=reference,
                kl_coef=kl_coef,
            )
            updates = []
            for part in mini_batches(batch, groups, config.loss, config.rollout.max_response_tokens):
                updates.append(self.actors.update(part))
                self.num_updates += 1

        metrics = step_metrics.collect(
            groups, rollouts["teacher"], group_rewards, advantages, updates, kl_coef, syncs, timer.seconds
        )
        if config.rollout.max_staleness:
            metrics |= step_metrics.staleness(groups, self.num_updates, config.loss.updates_per_batch)
        if needs.teacher:
            metrics["teacher/decay"] = decay
        metrics |= step_metrics.label_quality(
            groups, context.votes(), group_rewards, self._ground_truths(problems), self.equivalence
        )
        return StepResult(scored, metrics)

    @property
    def reference(self) -> str:
        """Whose weights the KL term holds the policy to."""
        return "teacher" if self.config.loss.kl_reference == "teacher" else "reference"

    def _recorded(self, step: int, problems: Sequence[Problem]) -> LoggedStep | None:
        if self.rollout_log is None:
            return None
        fresh = WeightVersion("policy", self.num_updates).number
        lagging = WeightVersion("policy", self.num_updates - self.config.loss.updates_per_batch).number
        versions = {fresh, lagging} if self.config.rollout.max_staleness else {fresh}
        return self.rollout_log.read(step, problems, self.method.needs.views, versions)

    def _stats(self, sequences: Sequences, weights: str) -> TokenStats:
        return self.actors.token_stats(sequences, weights, self.config.rollout.temperature)

    @staticmethod
    def _ground_truths(problems: Sequence[Problem]) -> Mapping[str, str | None]:
        return {problem.uid: problem.ground_truth for problem in problems}


def _scored(
    groups: Sequence[RolloutGroup],
    group_rewards: Sequence[GroupReward],
    advantages: Sequence[FloatArray],
    teacher_groups: Sequence[RolloutGroup],
    ground_truths: Mapping[str, str | None],
) -> list[ScoredGroup]:
    policy = [
        ScoredGroup(group, group_reward.label, group_reward.rewards, advantage, ground_truths.get(group.uid))
        for group, group_reward, advantage in zip(groups, group_rewards, advantages, strict=True)
    ]
    return policy + [ScoredGroup(group, None, None, None, ground_truths.get(group.uid)) for group in teacher_groups]
