"""What an update learns from: rollouts of teacher and policy, what they were rewarded with, and their advantages.

`RolloutSource` is the seam of sampling: whatever changes when, where and from which weights rollouts are drawn
(prefetch, label windows, engines of the teacher's own, votes that end early) is behind it, and neither the collector
nor the loop knows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_coreward.cluster.weight_sync import SyncReport
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward, Method
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.batch import to_sequences
from megatron_coreward.trainer.choice import chosen_rollouts, part_of, spread
from megatron_coreward.types import FloatArray, IntArray, Problem, RolloutGroup, Sequences, TokenStats


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What was sampled for a step."""

    policy: list[RolloutGroup]
    teacher: list[RolloutGroup]  # none if the method has no teacher
    syncs: list[SyncReport]  # that it took to bring the weights to the engines


@dataclass(frozen=True, slots=True)
class Experience:
    """A step up to its update. Rewards and advantages are of the policy's groups, in their order."""

    num_updates: int  # optimizer steps that the policy had taken
    rollouts: Rollouts
    chosen: list[IntArray]  # [n] places of the rollouts of each policy group that are trained on (`rollout.votes`)
    trained: list[RolloutGroup]  # the policy's groups with those rollouts alone
    sequences: Sequences  # of the trained groups
    token_stats: TokenStats | None  # of those sequences under the policy; None: nothing has asked for them
    context: BatchRewardContext  # the votes
    group_rewards: list[GroupReward]  # of all rollouts, trained on or not
    advantages: list[FloatArray]  # [n] of the trained groups
    ground_truths: Mapping[str, str | None]  # by uid; for people, who read them after the update

    @property
    def scored(self) -> list[ScoredGroup]:
        """Every group with what was concluded about it, the policy's before the teacher's."""
        parts = zip(self.rollouts.policy, self.group_rewards, self.advantages, self.chosen, strict=True)
        policy = [
            ScoredGroup(
                group,
                reward.label,
                reward.rewards,
                spread(advantages, rows, len(group.completions)),
                self.ground_truths.get(group.uid),
            )
            for group, reward, advantages, rows in parts
        ]
        return policy + [
            ScoredGroup(group, None, None, None, self.ground_truths.get(group.uid)) for group in self.rollouts.teacher
        ]


class RolloutSource(Protocol):
    """Where rollouts come from (`trainer.schedule.RolloutSchedule`)."""

    def sample(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """The rollouts of a step, after which the policy will have taken more than `num_updates` optimizer steps."""


class ScoringActors(Protocol):
    """What a collector needs of the actors (`cluster.actor_group.ActorGroup`)."""

    def token_stats(self, sequences: Sequences, weights: Any, temperature: float, statistics: bool) -> TokenStats: ...


@dataclass(frozen=True, slots=True)
class Collector:
    """Sample -> score -> advantages, the same for every method: it branches on what the method needs."""

    config: RunConfig
    method: Method
    actors: ScoringActors
    source: RolloutSource
    equivalence: AnswerEquivalence
    problems_of: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0

    def collect(self, step: int, num_updates: int, timer: PhaseTimer) -> Experience:
        """The experience of a step, counted from 1."""
        return self.score(step, num_updates, self.source.sample(step, num_updates, timer), timer)

    def score(
        self,
        step: int,
        num_updates: int,
        rollouts: Rollouts,
        timer: PhaseTimer,
        group_rewards: list[GroupReward] | None = None,
    ) -> Experience:
        """Rewards of the rollouts of a step (or those that are known already), and advantages."""
        needs, ground_truths = self.method.needs, {p.uid: p.ground_truth for p in self.problems_of(step - 1)}
        n, seed = self.config.rollout.n, self.config.seed
        chosen = [chosen_rollouts(group, n, seed, step) for group in rollouts.policy]
        trained = [part_of(group, rows) for group, rows in zip(rollouts.policy, chosen, strict=True)]
        with timer.phase("token_stats"):
            sequences = to_sequences(trained)
            stats = None
            if needs.token_stats:
                stats = self.actors.token_stats(sequences, "policy", self.config.rollout.temperature, True)
        with timer.phase("rewards"):
            context = BatchRewardContext(
                needs,
                self.equivalence,
                policy_groups=rollouts.policy,
                teacher_groups=rollouts.teacher,
                token_stats=stats,
                ground_truths=ground_truths if needs.ground_truth else None,
                min_margin=self.config.rewards.min_margin,
                votes_end_early=self.config.teacher.early_stop,
            )
            if group_rewards is None:
                group_rewards = [self.method.score(group, context) for group in rollouts.policy]
            advantages = [
                self._advantages(group, reward.of_rollouts(rows))
                for group, reward, rows in zip(rollouts.policy, group_rewards, chosen, strict=True)
            ]
        return Experience(
            num_updates, rollouts, chosen, trained, sequences, stats, context, group_rewards, advantages, ground_truths
        )

    def _advantages(self, group: RolloutGroup, reward: GroupReward) -> FloatArray:
        """[n] of the rollouts that are trained on. Raises RunError for rewards or advantages that are not finite."""
        try:
            return reward.advantages_of_group(self.config.loss.advantage_std)
        except ValueError as error:
            raise RunError(f"method {self.method.name}, question {group.uid} ({group.view}): {error}") from None
