"""What is sampled when, and from which weights, if engines are not to wait (`rollout.schedule: streaming`).

Groups of questions are handed to engines as these have room, for as many steps ahead as `rollout.max_staleness` allows
(`trainer.staleness`), and a step begins to learn as soon as its own are complete. New weights go to the engines when
nothing of the role is in flight, or, with `rollout.partial`, at every step: what is unfinished goes on with them.

If policy and teacher share the engines, these hold the weights of one of them at a time, and a weight sync needs the
actors. So only the policy's groups are drawn while the actors learn: the teacher's, those of later steps included, are
complete before the policy's begin. `teacher.engines` draws both beside the update.

What is ahead of a checkpoint is not part of it. A run that is started again has the steps in its rollout log, and draws
the groups of later steps again, from the weights that it then has; none of them had been learnt from.

Invariants (tests/trainer/test_streaming.py):
  1. Every question of an epoch is learnt from exactly once, whatever dies when, and across the border of an epoch.
  2. No token that a step learns from is older than `rollout.max_staleness` steps.
  3. Nothing that is in the rollout log is sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.methods.base import Needs
from megatron_coreward.rollout.requests import GroupName, GroupRequest, GroupWatcher, SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Rollouts
from megatron_coreward.trainer.label_windows import window_ahead
from megatron_coreward.trainer.sampling import step_requests, to_groups
from megatron_coreward.trainer.staleness import last_to_draw
from megatron_coreward.types import Problem, Role, RolloutGroup, View

Watch = Callable[[Role, Problem, View, SamplingRequest], GroupWatcher | None]


@dataclass(slots=True)
class StreamingSchedule:
    """The rollouts of a run's steps, in order."""

    config: RunConfig
    needs: Needs
    engines: RolloutEngines
    problems_of: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0
    logged: Callable[[int], bool] = lambda step: False  # whether a step's rollouts are in the rollout log
    watch: Watch = lambda role, problem, view, request: None  # who may end a group before all its samples have ended
    _submitted: dict[Role, set[int]] = field(default_factory=lambda: {"policy": set(), "teacher": set()})  # steps

    def sample(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """The rollouts of a step; those of later steps are on their way, as far as they may be.

        A step in the rollout log has its rollouts there. Nothing is drawn for it; what later steps need is.

        Args:
            num_updates: optimizer steps that the policy has taken.
        """
        self.engines.run(partial(self._bring_about, step, num_updates, timer), timer)
        groups = {role: self._collect(role, step) for role in self._submitted}
        return Rollouts(groups["policy"], groups["teacher"], self.engines.take_syncs())

    def _bring_about(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Returns when the step's rollouts are complete. After an engine's death it is asked again, and goes on."""
        sides: list[tuple[Role, ...]] = [("teacher", "policy")] if self.engines.shared else [("teacher",), ("policy",)]
        for roles in sides:
            must = any(self.engines.stalled(role) or self._lacking(role, step) for role in roles)
            if self.config.rollout.partial or must or not self._in_flight(roles):
                self._draw_ahead(roles, step, num_updates, timer)
        self.engines.wait([*self._names("teacher", step), *self._names("policy", step)], timer)
        for roles in sides:
            if not self._in_flight(roles):  # new weights may come now, if they did not before
                self._draw_ahead(roles, step, num_updates, timer)

    def _draw_ahead(self, roles: Sequence[Role], step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Brings the present weights of these roles to their engines, and has them draw whatever may be drawn now."""
        last = self.config.steps
        until = last_to_draw(step, self.config.rollout.max_staleness, last)
        if "teacher" in roles and self.needs.teacher:
            lacking = partial(self._lacking, "teacher")
            steps = window_ahead(step, until, self.config.teacher.lookahead, last, lacking)
            self._draw("teacher", steps, num_updates, timer)
            if self.engines.shared:  # the policy's come when these are complete
                submitted = sorted(self._submitted["teacher"])
                self.engines.wait([name for s in submitted for name in self._names("teacher", s)], timer)
        if "policy" in roles:
            steps = [s for s in range(step, until + 1) if self._lacking("policy", s)]
            self._draw("policy", steps, num_updates, timer)

    def _draw(self, role: Role, steps: Sequence[int], num_updates: int, timer: PhaseTimer) -> None:
        if not steps and not self.engines.in_flight(role):
            return
        version = self.engines.sync_weights(role, num_updates, timer)
        for step in steps:
            self.engines.submit(self._requests(role, step))
            self._submitted[role].add(step)
        self.engines.go_on(version)

    def _in_flight(self, roles: Sequence[Role]) -> bool:
        return any(self.engines.in_flight(role) for role in roles)

    def _lacking(self, role: Role, step: int) -> bool:
        if role == "teacher" and not self.needs.teacher:
            return False
        return step not in self._submitted[role] and not self.logged(step)

    def _requests(self, role: Role, step: int) -> list[GroupRequest]:
        problems, views = self.problems_of(step - 1), self.needs.sampled_views(role)
        asked = [(problem, view) for problem in problems for view in views]
        requests = step_requests(self.config, role, views, step, problems)
        return [
            GroupRequest(GroupName(step, role, place), request, self.watch(role, problem, view, request))
            for place, ((problem, view), request) in enumerate(zip(asked, requests, strict=True))
        ]

    def _names(self, role: Role, step: int) -> list[GroupName]:
        """Of the groups of a step that were submitted."""
        if step not in self._submitted[role]:
            return []
        count = len(self.problems_of(step - 1)) * len(self.needs.sampled_views(role))
        return [GroupName(step, role, place) for place in range(count)]

    def _collect(self, role: Role, step: int) -> list[RolloutGroup]:
        """The groups of a step; none if they are in the rollout log."""
        names = self._names(role, step)
        self._submitted[role].discard(step)
        if not names:
            return []
        completions = self.engines.collect(names)
        return to_groups(self.problems_of(step - 1), self.needs.sampled_views(role), role, completions)
