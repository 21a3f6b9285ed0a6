"""Further questions in place of those that teach nothing (`rollout.resample_flat`; dynamic sampling of DAPO).

A question is flat if all rollouts of each of its groups are rewarded alike: its advantages are zero. After the batch of
a step is sampled, as many further questions are drawn as are flat, then as many as are still lacking, until every place
of the batch teaches something or the step has drawn `resample_flat` times the batch. Places that stay flat keep their
question. What is trained on has the size of a batch, so nothing that teaches is drawn in vain.

The further questions are drawn from the weights of the moment; so rollouts of later steps must not be on their way.

Invariants (tests/trainer/test_resampling.py):
  1. A run that was stopped anywhere draws the same questions as one that was not.
  2. Every question of an epoch is drawn exactly once (`data.question_stream`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.question_stream import QuestionStream, StreamState
from megatron_coreward.rewards.methods.base import Needs
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Experience, Rollouts, RolloutSource
from megatron_coreward.trainer.sampling import step_requests, to_groups
from megatron_coreward.types import Problem, Role, RolloutGroup

NOTE = "questions"  # beside a step's rollouts: which problems it has trained on, and the state of the stream after it


class StepQuestions:
    """The problems of each step: those of the stream, and what came in their place."""

    def __init__(
        self,
        problems: Sequence[Problem],
        config: RunConfig,
        steps_done: int,
        state: Mapping[str, Any] | None,
        recorded: Callable[[int], str | None] = lambda step: None,
    ) -> None:
        """
        Args:
            state: `state_after(steps_done)` of the run that is resumed; None: nothing was drawn.
            recorded: the `NOTE` of a step in the rollout log; None: it is not there.
        """
        self._problems, self._batch_size, self._recorded = problems, config.data.batch_size, recorded
        most = self._batch_size * (1 + config.rollout.resample_flat)
        self._stream = QuestionStream(len(problems), most, config.seed, config.data.shuffle)
        begin = StreamState() if state is None else StreamState.of_json(dict(state))
        self._after = {steps_done: begin}  # states of the stream, by step; the last two
        self._places: list[int] = []  # of the step's problems in the data
        self._held: list[int] = []  # all that the step has drawn
        self._read: int | None = None  # the last step whose problems are those of the rollout log

    def of(self, step: int) -> list[Problem]:
        """The problems of a step, counted from 0: the batch of a new step, or what has come in its place by now."""
        number = step + 1
        if number == self._read and self._recorded(number) is None:  # its rollouts could not be read: it is drawn again
            self._read = None
            del self._after[number]
        if number not in self._after:
            note = self._recorded(number)
            if note is not None:
                found = json.loads(note)
                self._places, self._held, self._read = list(found["places"]), list(found["places"]), number
                self._keep(number, StreamState.of_json(found["after"]))
            else:
                self._places, after = self._stream.draw(self._after[number - 1], self._batch_size, ())
                self._held = list(self._places)
                self._keep(number, after)
        return [self._problems[place] for place in self._places]

    def further(self, step: int, count: int) -> list[int]:
        """The places of further problems for a step (counted from 1) that has begun."""
        drawn, after = self._stream.draw(self._after[step], count, self._held)
        self._held += drawn
        self._keep(step, after)
        return drawn

    def problem(self, place: int) -> Problem:
        """A problem by its place in the data."""
        return self._problems[place]

    def put(self, at: int, place: int) -> None:
        """Lets a problem stand in place of the step's problem number `at`."""
        self._places[at] = place

    def state_after(self, step: int) -> dict[str, Any]:
        """The state of the stream after a step, for a checkpoint."""
        return self._after[step].to_json()

    def note(self, step: int) -> dict[str, str]:
        """What the rollout log keeps of a step."""
        return {NOTE: json.dumps({"places": self._places, "after": self.state_after(step)})}

    def _keep(self, step: int, state: StreamState) -> None:
        self._after = {number: known for number, known in self._after.items() if number >= step - 1} | {step: state}


@dataclass(slots=True)
class ResamplingSource:
    """A source whose rollouts teach something, as far as further questions reach."""

    config: RunConfig
    needs: Needs
    source: RolloutSource
    engines: RolloutEngines
    questions: StepQuestions
    score: Callable[[int, int, Rollouts, PhaseTimer], Experience]  # `Collector.score`
    logged: Callable[[int], bool] = lambda step: False  # whether a step's rollouts are in the rollout log
    _metrics: dict[str, float] = field(default_factory=dict)

    def sample(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """The rollouts of a step (`RolloutSource`), after further questions have come in place of flat ones."""
        rollouts = self.source.sample(step, num_updates, timer)
        if self.logged(step):
            return rollouts
        batch, policy, teacher = self.config.data.batch_size, list(rollouts.policy), list(rollouts.teacher)
        of_role: dict[Role, list[RolloutGroup]] = {"policy": policy, "teacher": teacher}
        flat = self._flat(self.score(step, num_updates, rollouts, timer), range(batch))
        left, drawn, flat_drawn = self.config.rollout.resample_flat * batch, batch, len(flat)
        while flat and left:
            places = self.questions.further(step, min(len(flat), left))
            left, drawn = left - len(places), drawn + len(places)
            for at, place in zip(flat, places, strict=False):
                self.questions.put(at, place)
            asked, flat = flat[: len(places)], flat[len(places) :]
            problems = [self.questions.problem(place) for place in places]
            for role, groups in of_role.items():
                each = len(groups) // batch  # groups of a question
                found = self._draw(role, problems, step, num_updates, timer) if each else []
                for number, at in enumerate(asked):
                    groups[at * each : (at + 1) * each] = found[number * each : (number + 1) * each]
            still = self._flat(self.score(step, num_updates, Rollouts(policy, teacher, []), timer), asked)
            flat_drawn += len(still)
            flat = sorted([*flat, *still])
        self._metrics = {
            "rollout/flat_share": flat_drawn / drawn,
            "rollout/further_questions": float(drawn - batch),
        }
        return Rollouts(policy, teacher, [*rollouts.syncs, *self.engines.take_syncs()])

    def take_metrics(self) -> dict[str, float]:
        """Of the step that was sampled last; empty: it was in the rollout log."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _flat(self, experience: Experience, among: Sequence[int]) -> list[int]:
        """Which of these questions of the batch have no advantage in any of their groups."""
        size = len(experience.advantages) // self.config.data.batch_size
        return [at for at in among if not any(a.any() for a in experience.advantages[at * size : (at + 1) * size])]

    def _draw(
        self, role: Role, problems: Sequence[Problem], step: int, num_updates: int, timer: PhaseTimer
    ) -> list[RolloutGroup]:
        views = self.needs.sampled_views(role)
        requests = step_requests(self.config, role, views, step, problems)

        def ask() -> list[RolloutGroup]:
            version = self.engines.sync_weights(role, num_updates, timer)
            with timer.phase("rollout"):
                return to_groups(problems, views, role, self.engines.sample(requests, version))

        return self.engines.run(ask, timer)
