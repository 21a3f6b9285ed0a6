"""What the soak of a streamed run looks for is found if it is there, and a run without it passes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.config.schema import RunConfig
from megatron_coreward.telemetry.jsonl import JsonlSink
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, dump_rollouts
from megatron_coreward.types import Completion, RolloutGroup, View, WeightVersion
from tests.trainer.fakes import VIEWS, make_problem
from tools.soak import METHODS, STREAMING, streaming_problems, task_config

QUESTIONS, BATCH, STEPS = 8, 4, 3  # three steps are an epoch and a half

Steps = dict[int, list[ScoredGroup]]


def config_of(folder: Path, method: str = "co_rewarding_i") -> RunConfig:
    return task_config(folder, folder / "run", method, *STREAMING, f"steps={STEPS}", f"data.batch_size={BATCH}")


def group(number: int, view: View, update: int, size: int = 4) -> ScoredGroup:
    """The first tokens are from the weights of this update, the second ones from those of the next; from 0, all are."""
    first, second = (WeightVersion("policy", n).number for n in (max(update, 0), update + 1))
    later = ((1, second),) if second != first else ()
    tokens, logprobs = np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.float32)
    made = Completion(tokens, logprobs, "", None, "stop", first, later)
    zeros = np.zeros(size, dtype=np.float32)
    problem = make_problem(number)
    return ScoredGroup(
        RolloutGroup(problem.uid, view, "policy", problem.prompts[view], (made,) * size), None, zeros, zeros
    )


def good_steps() -> Steps:
    """Steps 1 and 2 are the first epoch, step 3 the half of another; each begins one update before its own weights."""
    return {
        step: [
            group((step - 1) * BATCH % QUESTIONS + place, view, step - 2) for place in range(BATCH) for view in VIEWS
        ]
        for step in range(1, STEPS + 1)
    }


def problems_of(folder: Path, steps: Steps, rows: tuple[int, ...] = (0, 1, 2, 3)) -> list[str]:
    config = config_of(folder)
    sink = JsonlSink(config.run_dir / "metrics.jsonl")
    for row in rows:
        sink.write(row, {"step_time_s": 0.5})
    for step, scored in steps.items():
        dump_rollouts(config.run_dir, step, scored)
    return [*streaming_problems(config, QUESTIONS)]


@pytest.mark.parametrize("method", METHODS)
def test_the_run_that_is_soaked_is_streamed_one_step_ahead_over_the_border_of_an_epoch(
    tmp_path: Path, method: str
) -> None:
    config = task_config(tmp_path, tmp_path / "run", method, *STREAMING)
    assert (config.rollout.schedule, config.rollout.max_staleness, config.rollout.partial) == ("streaming", 1, True)
    assert config.steps * config.data.batch_size > 64
    assert config.telemetry.dump_rollouts


def test_a_run_that_learns_every_question_once_from_young_tokens_has_no_problem(tmp_path: Path) -> None:
    assert problems_of(tmp_path, good_steps()) == []


def without_logprobs(item: ScoredGroup) -> ScoredGroup:
    (first, *others) = item.group.completions
    bare = replace(first, logprobs=first.logprobs[:1])
    return replace(item, group=replace(item.group, completions=(bare, *others)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda steps: steps.pop(2), "step 2: 0 groups of 0 questions; expected 2 of each of 4"),
        (lambda steps: steps[2].pop(), "step 2: 7 groups of 4 questions; expected 2 of each of 4"),
        (lambda steps: steps[2].append(steps[2][0]), "step 2: 9 groups of 4 questions; expected 2 of each of 4"),
        (
            lambda steps: steps.update({2: [group(place, view, 0) for place in range(BATCH) for view in VIEWS]}),
            "epoch 1: learnt more than once: fake/0, fake/1, fake/2, fake/3",
        ),
        (
            lambda steps: steps[3].__setitem__(0, group(0, "original", 0)),
            "step 3: tokens are 0 to 2 steps old; allowed: 0 to 1",
        ),
        (
            lambda steps: steps[3].__setitem__(0, group(0, "original", 2)),
            "step 3: tokens are -1 to 1 steps old; allowed: 0 to 1",
        ),
        (
            lambda steps: steps[1].__setitem__(0, group(0, "original", 0, size=3)),
            "step 1: a group has not all of its 4 rollouts",
        ),
        (
            lambda steps: steps[1].__setitem__(0, without_logprobs(steps[1][0])),
            "step 1: a rollout has not a log-prob for every token",
        ),
    ],
)
def test_what_a_streamed_run_must_not_have_is_named(
    tmp_path: Path, damage: Callable[[Steps], object], said: str
) -> None:
    steps = good_steps()
    damage(steps)
    assert said in problems_of(tmp_path, steps)


def test_a_step_that_has_no_row_is_named(tmp_path: Path) -> None:
    (said,) = problems_of(tmp_path, good_steps(), rows=(0, 1, 3))
    assert said == "metrics.jsonl: found the steps [0, 1, 3]; expected each of 1 to 3 once"
