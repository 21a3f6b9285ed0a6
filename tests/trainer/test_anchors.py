"""Anchors are chosen once, drawn when it is time, compared with the start, and the same after a resume."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.trainer.anchors import FIRST_ROLLOUTS, LATER_DRAWS, Anchors, draw_anchors
from megatron_coreward.trainer.sampling import step_requests
from megatron_coreward.types import Completion, Problem, RolloutGroup
from tests.trainer.fakes import make_config, make_problem

SETTINGS = GuardSettings(anchors=2, anchor_every=5, anchor_rollouts=4)
PROBLEMS = [make_problem(number) for number in range(6)]


class Policy:
    """Answers each question with the texts that it is given for it, in turn; notes what it was asked."""

    def __init__(self, **answers: Sequence[str | None]) -> None:
        self.answers = answers
        self.asked: list[tuple[list[str], int, int]] = []

    def __call__(self, problems: Sequence[Problem], n: int, seed_step: int) -> list[RolloutGroup]:
        self.asked.append(([problem.uid for problem in problems], n, seed_step))
        return [self._group(problem, n) for problem in problems]

    def _group(self, problem: Problem, n: int) -> RolloutGroup:
        texts = self.answers.get(f"q{problem.uid.split('/')[1]}", ["0"])
        zero = np.zeros(1, dtype=np.int32)
        made = [Completion(zero, np.zeros(1, dtype=np.float32), "", texts[i % len(texts)], "stop", 0) for i in range(n)]
        return RolloutGroup(problem.uid, "original", "policy", problem.prompts["original"], tuple(made))


def open_anchors(path: Path, first_step: int = 0, settings: GuardSettings = SETTINGS) -> Anchors:
    return Anchors(path, PROBLEMS, settings, AnswerEquivalence("exact"), first_step)


# Questions 0 and 2 are clear (6 of 8 agree); 1 is split, 3 is never asked, because 2 anchors have 4 candidates.
START = Policy(q0=["7", "7", "7", "8"], q1=["1", "2"], q2=["5"], q3=["9"])


def test_the_first_questions_with_a_clear_majority_are_the_anchors(tmp_path: Path) -> None:
    path, policy = tmp_path / "anchors.jsonl", Policy(**START.answers)
    metrics = open_anchors(path).observe(0, policy)
    assert policy.asked == [
        ([f"fake/{number}" for number in range(4)], FIRST_ROLLOUTS, 0),
        (["fake/0", "fake/2"], 4, LATER_DRAWS),
    ]
    assert json.loads(path.read_text())["labels"] == {"fake/0": "7", "fake/2": "5"}
    assert metrics == {
        "anchor/moved_share": 0,
        "anchor/agreement": 7 / 8,
        "anchor/questions": 2,
        "anchor/kept": 1,
    }


def test_with_a_method_that_reads_ground_truths_only_right_majorities_are_anchors(tmp_path: Path) -> None:
    """The wrong ones are what it corrects: they would raise an alarm in a run that learns."""
    truth = PROBLEMS[0].ground_truth
    policy = Policy(q0=[truth], q1=[truth, "1"], q2=["5"], q3=["9"])
    assert PROBLEMS[2].ground_truth != "5"
    for only_right, chosen in ((False, ["fake/0", "fake/2"]), (True, ["fake/0"])):
        path = tmp_path / f"{only_right}.jsonl"
        anchors = Anchors(path, PROBLEMS, SETTINGS, AnswerEquivalence("exact"), only_right=only_right)
        assert anchors.observe(0, policy)["anchor/questions"] == len(chosen)
        assert list(json.loads(path.read_text())["labels"]) == chosen


def test_too_few_right_majorities_are_not_said_to_be_unclear(tmp_path: Path) -> None:
    settings = GuardSettings(anchors=2, min_anchors=1)
    anchors = Anchors(tmp_path / "a.jsonl", PROBLEMS, settings, AnswerEquivalence("exact"), only_right=True)
    with pytest.raises(InputError, match=r"found 0 anchor questions, .* that is the ground truth.*allowed: 1 or more"):
        anchors.observe(0, Policy(q0=["9"], q1=["9"], q2=["9"], q3=["9"]))


def test_a_later_draw_is_compared_with_the_start(tmp_path: Path) -> None:
    anchors = open_anchors(tmp_path / "anchors.jsonl")
    anchors.observe(0, START)
    metrics = anchors.observe(5, Policy(q0=["8", "8", "7", None], q2=["5"]))
    assert metrics["anchor/moved_share"] == 1 / 2
    assert metrics["anchor/agreement"] == 5 / 8
    assert metrics["anchor/kept"] == pytest.approx((7 / 8 + 5 / 8) / 2 / (7 / 8))


def test_what_is_kept_is_held_against_the_most_that_was_kept_after_a_resume_as_well(tmp_path: Path) -> None:
    path, right, half = tmp_path / "anchors.jsonl", Policy(q0=["7"], q2=["5"]), Policy(q0=["8"], q2=["5"])
    anchors = open_anchors(path)
    draws = ((0, START), (5, right), (10, right), (15, half), (20, half))
    found = [anchors.observe(step, policy)["anchor/kept"] for step, policy in draws]
    assert found == [1, 1, 1, 3 / 4, 1 / 2]
    resumed = open_anchors(path, first_step=15)
    assert [resumed.observe(step, half)["anchor/kept"] for step in (15, 20)] == [3 / 4, 1 / 2]


def test_answers_that_have_come_back_are_not_lost(tmp_path: Path) -> None:
    """Of the last draw and the mean of the last two, the higher one counts; it is never more than all."""
    right, half, none = (Policy(q0=[q0], q2=[q2]) for q0, q2 in (("7", "5"), ("8", "5"), ("8", "6")))
    anchors = open_anchors(tmp_path / "anchors.jsonl")
    draws = ((0, START), (5, right), (10, right), (15, none), (20, half), (25, right), (30, none))
    assert [anchors.observe(step, policy)["anchor/kept"] for step, policy in draws] == [1, 1, 1, 1 / 2, 1 / 2, 1, 1 / 2]


def test_they_are_due_before_the_first_step_and_then_every_few(tmp_path: Path) -> None:
    anchors = open_anchors(tmp_path / "anchors.jsonl")
    assert [step for step in range(12) if anchors.due(step)] == [0]  # nothing has been chosen
    anchors.observe(0, START)
    assert [step for step in range(1, 12) if anchors.due(step)] == [5, 10]


def test_a_resumed_run_draws_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    later, path = Policy(q0=["8"], q2=["5"]), tmp_path / "cut.jsonl"
    whole = open_anchors(tmp_path / "whole.jsonl")
    expected = [whole.observe(step, policy) for step, policy in ((0, START), (5, START), (10, later))]
    first = open_anchors(path)
    assert [first.observe(0, START), first.observe(5, START)] == expected[:2]
    first.observe(10, START)  # of an attempt that was killed before its checkpoint
    with path.open("ab") as file:
        file.write(b'{"step": 15, "ans')
    resumed = open_anchors(path, first_step=8)
    assert resumed.due(10)
    assert not resumed.due(9)
    assert resumed.observe(10, later) == expected[2]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_without_a_clear_majority_there_is_no_anchor_and_no_metric_but_their_number(tmp_path: Path) -> None:
    anchors = open_anchors(tmp_path / "anchors.jsonl")
    unsure = Policy(**{f"q{number}": ["1", "2", "3", None] for number in range(6)})
    assert anchors.observe(0, unsure) == {"anchor/questions": 0}
    assert not any(anchors.due(step) for step in range(1, 20))


def test_fewer_than_are_asked_for_end_the_run_before_its_first_step(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"min_anchors": 2})
    assert open_anchors(tmp_path / "enough.jsonl", settings=settings).observe(0, START)["anchor/questions"] == 2
    unsure = Policy(q0=["7"], q1=["1", "2"], q2=["1", "2"], q3=["1", "2"])
    with pytest.raises(InputError, match=r"found 1 anchor questions, .* allowed: 2 or more \(guard.min_anchors\)"):
        open_anchors(tmp_path / "few.jsonl", settings=settings).observe(0, unsure)
    assert len(unsure.asked) == 1  # they are not drawn


def test_they_are_drawn_from_the_distribution_of_training(tmp_path: Path) -> None:
    class Engines:
        def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
            assert {(r.temperature, r.top_p, r.top_k) for r in requests} == {(0.7, 0.9, 20)}
            return [[] for _ in requests]

    config = make_config(**{"rollout.temperature": 0.7, "rollout.top_p": 0.9, "rollout.top_k": 20})
    assert len(draw_anchors(config, Engines(), 0, PROBLEMS[:2], 4, LATER_DRAWS)) == 2


def test_what_training_draws_does_not_depend_on_anchors() -> None:
    """Questions, seeds and settings of every request of a step; the weights are those of training in any case."""
    asked = [
        [
            (request.seed, request.n, request.temperature, request.max_tokens, request.prompt.tolist())
            for step in range(1, 4)
            for request in step_requests(
                make_config(**{"guard.anchors": count}), "policy", ("original",), step, PROBLEMS
            )
        ]
        for count in (0, 64)
    ]
    assert asked[0] == asked[1]
    assert len({seed for seed, *_ in asked[0]}) == 3 * len(PROBLEMS)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "anchors.jsonl"
    path.write_text('{"step": 0, "answers": {}}\nnonsense\n')
    with pytest.raises(InputError, match=r"anchors.jsonl, line 2"):
        open_anchors(path, first_step=3)
