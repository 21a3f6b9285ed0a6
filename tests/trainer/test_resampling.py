"""Questions that teach nothing make room for further ones: bounded, each once an epoch, also after a stop."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.rollout_dump import discard_rollouts
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Collector, Experience
from megatron_coreward.trainer.resampling import NOTE, ResamplingSource, StepQuestions
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.types import Completion
from tests.trainer.fakes import FakeActors, FakeEngines, make_config, make_problem
from tests.trainer.test_loop import make_sync

PROBLEMS = [make_problem(number) for number in range(12)]


class EnginesOf(FakeEngines):
    """All completions to some questions have one answer."""

    def __init__(self, flat: Sequence[int]) -> None:
        super().__init__([])
        self.flat = flat

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        completions = super().sample(requests, expected_version)
        return [
            [of_request[0]] * len(of_request) if request.prompt[0] - 10 in self.flat else of_request
            for request, of_request in zip(requests, completions, strict=True)
        ]


class Run:
    """A run up to its updates."""

    def __init__(
        self,
        flat: Sequence[int],
        *,
        method: str = "majority_voting",
        further: int = 1,
        log_in: Path | None = None,
        steps_done: int = 0,
        state: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        config = make_config(method, **{"rollout.resample_flat": further, "data.shuffle": "false"} | changes)
        actors, self.engines = FakeActors([]), EnginesOf(flat)
        engines = RolloutEngines(self.engines, make_sync(actors, self.engines))
        log = None if log_in is None else RolloutLog(log_in, "f", steps_done + 1, keep=True)
        recorded = (lambda step: None) if log is None else (lambda step: log.note(step, NOTE))
        logged = (lambda step: False) if log is None else log.has
        self.questions = StepQuestions(PROBLEMS, config, steps_done, state, recorded)
        needs = METHODS[method].needs
        source = RolloutSchedule(config, needs, engines, self.questions.of, logged)
        plain = Collector(config, METHODS[method], actors, source, AnswerEquivalence("exact"), self.questions.of)
        self.source = ResamplingSource(config, needs, source, engines, self.questions, plain.score, logged)
        collector = replace(plain, source=self.source)
        self._collect = (collector if log is None else LoggedCollector(collector, log, self.questions.note)).collect

    def step(self, step: int) -> Experience:
        return self._collect(step, step - 1, PhaseTimer())

    def drawn(self) -> list[int]:
        """The questions that the policy was asked, in order."""
        return [int(request.prompt[0]) - 10 for request in self.engines.requests if request.n == 4]


def questions_of(experience: Experience) -> list[int]:
    return [int(group.uid.removeprefix("fake/")) for group in experience.trained if group.view == "original"]


def test_further_questions_stand_in_the_places_of_flat_ones() -> None:
    run = Run(flat=[1, 2])
    experience = run.step(1)
    assert run.drawn() == [0, 1, 2, 3]  # 2 for 1, which is flat as well, and 3 for 2
    assert questions_of(experience) == [0, 3]
    assert all(advantages.any() for advantages in experience.advantages)
    assert run.source.take_metrics() == {"rollout/flat_share": 0.5, "rollout/further_questions": 2.0}
    assert run.source.take_metrics() == {}
    assert questions_of(run.step(2)) == [4, 5]


def test_a_step_draws_no_more_than_so_many_times_the_batch() -> None:
    run = Run(flat=range(12), further=2)
    experience = run.step(1)
    assert run.drawn() == [0, 1, 2, 3, 4, 5]
    assert questions_of(experience) == [4, 5]
    assert run.source.take_metrics() == {"rollout/flat_share": 1.0, "rollout/further_questions": 4.0}


def test_a_batch_that_teaches_is_left_as_it_is() -> None:
    run = Run(flat=[])
    assert questions_of(run.step(1)) == [0, 1]
    assert run.source.take_metrics() == {"rollout/flat_share": 0.0, "rollout/further_questions": 0.0}


def test_a_question_of_two_views_is_flat_if_both_are_and_both_are_replaced() -> None:
    experience = Run(flat=[0], method="co_rewarding_i").step(1)
    assert questions_of(experience) == [2, 1]
    assert [(group.uid, group.view) for group in experience.trained] == [
        ("fake/2", "original"),
        ("fake/2", "rephrased"),
        ("fake/1", "original"),
        ("fake/1", "rephrased"),
    ]


def test_the_teacher_labels_the_further_questions_too() -> None:
    experience = Run(flat=[0], method="co_rewarding_ii").step(1)
    assert [group.uid for group in experience.rollouts.teacher] == ["fake/2", "fake/1"]
    assert questions_of(experience) == [2, 1]


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_every_question_of_an_epoch_is_drawn_once(shuffle: str) -> None:
    run = Run(flat=[1, 2, 5, 7, 8], further=2, **{"data.shuffle": shuffle})
    for step in range(1, 10):
        run.step(step)
    drawn = run.drawn()
    whole = len(drawn) // 12
    assert whole >= 2
    assert set(Counter(drawn[: 12 * whole]).values()) <= {whole - 1, whole, whole + 1}
    state = run.questions.state_after(9)
    times = Counter([*drawn, *(int(PROBLEMS[place].uid.removeprefix("fake/")) for place in state["put_off"])])
    assert set(times.values()) <= {state["position"] // 12, state["position"] // 12 + 1}


def test_a_run_goes_on_from_a_checkpoint_and_from_the_rollout_log(tmp_path: Path) -> None:
    flat = [1, 2, 5, 7, 8]
    whole = Run(flat, further=2)
    expected = [questions_of(whole.step(step)) for step in range(1, 6)]

    first = Run(flat, further=2, log_in=tmp_path)
    begun = [questions_of(first.step(step)) for step in range(1, 4)]
    state = first.questions.state_after(2)  # the checkpoint is of step 2; step 3 died in its update
    again = Run(flat, further=2, log_in=tmp_path, steps_done=2, state=state)
    third = questions_of(again.step(3))
    assert again.drawn() == []
    rest = [questions_of(again.step(step)) for step in (4, 5)]
    assert [*begun[:2], third, *rest] == expected
    assert again.questions.state_after(5) == whole.questions.state_after(5)


def test_a_step_of_the_log_that_cannot_be_read_draws_its_questions_again_and_takes_further_ones(tmp_path: Path) -> None:
    first = Run([1, 2], further=2, log_in=tmp_path)
    expected = [questions_of(first.step(step)) for step in (1, 2)]
    again = Run([1, 2], further=2, log_in=tmp_path)
    assert [problem.uid for problem in again.questions.of(0)] == [f"fake/{place}" for place in expected[0]]
    discard_rollouts(tmp_path, 1)
    assert [questions_of(again.step(step)) for step in (1, 2)] == expected
    assert again.drawn() == first.drawn()


def test_what_a_logged_step_has_drawn_is_not_what_it_trains_on() -> None:
    note = json.dumps({"places": [0, 3], "after": {"position": 4, "put_off": []}})
    config = make_config("majority_voting", **{"rollout.resample_flat": 1, "data.shuffle": "false"})
    questions = StepQuestions(PROBLEMS, config, 0, None, lambda step: note if step == 1 else None)
    questions.of(0)
    questions.further(1, 1)
    assert len(questions.of(0)) == 2
