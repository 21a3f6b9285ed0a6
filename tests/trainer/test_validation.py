"""Validation: what is drawn, how it is compared, and a row of scores for each data set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.config.schema import ValidationSettings
from megatron_coreward.config.validate import score_names
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.trainer.validation import measure_accuracy
from megatron_coreward.types import Completion, Problem
from tests.trainer.fakes import make_problem


class ScriptedEngines:
    """Answers a prompt as a test asks: the first answer if greedy, else the others in order."""

    def __init__(self, answers: Mapping[int, Sequence[str]]) -> None:
        self.answers = answers  # by the first token of the prompt
        self.requests: list[SamplingRequest] = []

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        self.requests += requests
        return [[self._sample(request, i) for i in range(request.n)] for request in requests]

    def _sample(self, request: SamplingRequest, place: int) -> Completion:
        answers = self.answers[int(request.prompt[0])]
        answer = answers[0] if request.temperature == 0 else answers[1 + place]
        return Completion(np.ones(2, np.int32), np.zeros(2, np.float32), "", answer, "stop", 0)


def problem(number: int, ground_truth: str | None) -> Problem:
    return replace(make_problem(number), ground_truth=ground_truth)


# Three questions: the greedy answer, then two random ones.
ANSWERS = {10: ["7", "7", "1"], 11: ["1", "8", "8"], 12: [r"\dfrac12", "0", "0.5"]}
PROBLEMS = {"one": [problem(0, "7"), problem(1, "8")], "openai/two": [problem(2, r"\frac{1}{2}")]}


def measure(
    relation: Any = "hendrycks", held_out: Any = PROBLEMS, **changes: Any
) -> tuple[dict[str, float], list[Any]]:
    engines = ScriptedEngines(ANSWERS)
    settings = ValidationSettings(n=2, **changes)
    with AnswerEquivalence(relation) as equivalence:
        metrics = measure_accuracy(engines, held_out, settings, equivalence, max_tokens=8, version=0, seed=1)
    return metrics, engines.requests


def test_each_data_set_has_scores_of_its_own_beside_those_of_all() -> None:
    metrics, _ = measure()
    assert metrics == pytest.approx(
        {
            "val/pass@1": 2 / 3,
            "val/avg@2": (0.5 + 1 + 0.5) / 3,
            "val/pass@2": 1.0,
            "val/maj@2": 2 / 3,  # of two answers that differ the first counts
            "val/one/pass@1": 0.5,
            "val/one/avg@2": 0.75,
            "val/one/pass@2": 1.0,
            "val/one/maj@2": 1.0,
            "val/openai/two/pass@1": 1.0,
            "val/openai/two/avg@2": 0.5,
            "val/openai/two/pass@2": 1.0,
            "val/openai/two/maj@2": 0.0,
        }
    )


def test_one_data_set_has_one_row_of_scores() -> None:
    metrics, _ = measure(held_out={"one": PROBLEMS["one"]})
    assert set(metrics) == {"val/pass@1", "val/avg@2", "val/pass@2", "val/maj@2"}


@pytest.mark.parametrize(
    ("samples", "scores", "draws"),
    [
        ("greedy", ["pass@1"], [(1, 0.0)]),
        ("random", ["avg@2", "pass@2", "maj@2"], [(2, 1.0)]),
        ("both", ["pass@1", "avg@2", "pass@2", "maj@2"], [(1, 0.0), (2, 1.0)]),
    ],
)
def test_only_what_is_asked_for_is_drawn(samples: Any, scores: list[str], draws: list[tuple[int, float]]) -> None:
    metrics, requests = measure(samples=samples)
    assert score_names(ValidationSettings(n=2, samples=samples)) == scores
    assert {name.rpartition("/")[2] for name in metrics} == set(scores)
    assert [(r.n, r.temperature) for r in requests] == [draw for draw in draws for _ in range(3)]


def test_answers_are_compared_as_the_validation_is_reported() -> None:
    assert measure("exact")[0]["val/openai/two/pass@1"] == 0.0
    assert measure("hendrycks")[0]["val/openai/two/pass@1"] == 1.0


def test_a_question_without_a_ground_truth_counts_and_is_never_right() -> None:
    metrics, _ = measure(held_out={"one": [problem(0, None), problem(1, "8")]})
    assert (metrics["val/pass@1"], metrics["val/avg@2"], metrics["val/maj@2"]) == (0.0, 0.5, 0.5)


def test_a_single_sample_has_no_pass_at_one_of_its_own() -> None:
    assert score_names(ValidationSettings(n=1)) == ["pass@1", "avg@1", "maj@1"]
