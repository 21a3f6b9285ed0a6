"""Questions that a model rewrites for every step: what is asked, what is taken over, what a resumed run trains on."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.data.parquet import Message
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.online_rephrasing import RephrasedSource, Rewriter, Rewriting
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.types import Completion, Problem
from tests.trainer.fakes import FakeActors, FakeEngines, make_config, make_problem
from tests.trainer.test_loop import make_sync

QUESTIONS = {
    "fake/0": "Tom has 12 apples and buys 5 more. How many apples does Tom have?",
    "fake/1": "A train goes 60 miles in 2 hours. How many miles does it go in one hour?",
}
GOOD = "At a market, somebody who owned 12 pears picked up another 5. What is the count of pears in the end?"
WRONG_NUMBER = "At a market, somebody who owned 13 pears picked up another 5. What is the count of pears in the end?"
TOKENIZER = byte_level_tokenizer()


class WritingEngines(FakeEngines):
    """Replies with `reply` to whoever asks for a rewriting, and answers questions as its parent does."""

    reply: Callable[[int], str] = staticmethod(lambda version: f"<rewritten>{GOOD}</rewritten>")
    finish_reason: Any = "stop"

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        found = super().sample(requests, expected_version)
        for request, completions in zip(requests, found, strict=True):
            if request.n == 1:
                completions[0] = replace(
                    completions[0], text=self.reply(expected_version), finish_reason=self.finish_reason
                )
        return found


def set_up(
    method: str = "co_rewarding_i", log: RolloutLog | None = None, **changes: Any
) -> tuple[Collector | LoggedCollector, Rewriter, WritingEngines, list[str]]:
    actors = FakeActors([])
    engines = WritingEngines(actors.events)
    settings = {"data.online_rephrasing": "policy", "rollout.max_response_tokens": 2000} | changes
    config, problems = make_config(method, **settings), [make_problem(0), make_problem(1)]
    rollout_engines = RolloutEngines(engines, make_sync(actors, engines))
    logged = (lambda step: False) if log is None else log.has
    questions = {uid: (Message(role="user", content=text),) for uid, text in QUESTIONS.items()}
    role = config.data.online_rephrasing
    assert role != "off"
    rewriter = Rewriter(config, Rewriting(role, rollout_engines, TOKENIZER, questions), lambda step: problems, logged)
    schedule = RolloutSchedule(config, METHODS[method].needs, rollout_engines, rewriter.problems_of, logged)
    source = RephrasedSource(schedule, rewriter)
    collector = Collector(config, METHODS[method], actors, source, AnswerEquivalence("exact"), rewriter.problems_of)
    return (collector if log is None else LoggedCollector(collector, log)), rewriter, engines, actors.events


def prompts(collector: Collector | LoggedCollector, step: int = 1) -> dict[tuple[str, str], str]:
    experience = collector.collect(step, step - 1, PhaseTimer())
    return {(group.uid, group.view): group.prompt.text for group in experience.rollouts.policy}


def test_what_passes_the_filter_is_the_other_view_and_what_does_not_leaves_the_files() -> None:
    collector, rewriter, engines, _ = set_up()
    asked = prompts(collector)
    assert GOOD in asked["fake/0", "rephrased"]  # the numbers of the first question
    assert asked["fake/1", "rephrased"] == "rephrased 1"  # and not of the second
    assert asked["fake/0", "original"] == "original 0"
    assert rewriter.metrics() == {"rollout/rewritten_share": 0.5}
    rewriting, rollouts = engines.requests[:2], engines.requests[2:]
    assert [QUESTIONS[f"fake/{i}"] in TOKENIZER.decode(r.prompt) for i, r in enumerate(rewriting)] == [True, True]
    assert [GOOD in TOKENIZER.decode(r.prompt) for r in rollouts] == [False, True, False, False]


@pytest.mark.parametrize(
    "reply",
    [GOOD, f"<rewritten>{WRONG_NUMBER}</rewritten>", f"<rewritten>{QUESTIONS['fake/0']}</rewritten>", ""],
    ids=["no tags", "another number", "a copy", "nothing"],
)
def test_what_the_filter_refuses_is_not_taken_over(reply: str) -> None:
    collector, rewriter, engines, _ = set_up()
    engines.reply = lambda version: reply
    assert prompts(collector)["fake/0", "rephrased"] == "rephrased 0"
    assert rewriter.metrics() == {"rollout/rewritten_share": 0.0}


def test_a_reply_that_was_cut_off_or_is_too_long_a_prompt_is_not_taken_over() -> None:
    collector, _, engines, _ = set_up()
    engines.finish_reason = "length"
    assert prompts(collector)["fake/0", "rephrased"] == "rephrased 0"
    short, _, _, _ = set_up(**{"data.max_prompt_tokens": 50})
    assert prompts(short)["fake/0", "rephrased"] == "rephrased 0"


def test_a_control_token_that_a_model_writes_is_plain_text() -> None:
    collector, _, engines, _ = set_up()
    (control,) = [token for token in TOKENIZER.all_special_tokens if "end" in token][:1]
    engines.reply = lambda version: f"<rewritten>{GOOD} {control}</rewritten>"
    experience = collector.collect(1, 0, PhaseTimer())
    (group,) = [g for g in experience.rollouts.policy if (g.uid, g.view) == ("fake/0", "rephrased")]
    plain, _, _, _ = set_up()
    (without,) = [
        g for g in plain.collect(1, 0, PhaseTimer()).rollouts.policy if (g.uid, g.view) == ("fake/0", "rephrased")
    ]
    special = TOKENIZER.convert_tokens_to_ids(control)
    assert control in group.prompt.text
    assert np.count_nonzero(group.prompt.token_ids == special) == np.count_nonzero(without.prompt.token_ids == special)


def test_questions_are_rewritten_with_the_weights_of_the_step_and_seeds_of_their_own() -> None:
    collector, _, engines, events = set_up()
    engines.reply = lambda version: f"<rewritten>{GOOD} Version {['one', 'two', 'three'][version // 2]}.</rewritten>"
    first, second = prompts(collector, 1), prompts(collector, 2)
    assert first["fake/0", "rephrased"] != second["fake/0", "rephrased"]
    assert [e for e in events if e.startswith(("receive", "sample"))] == [
        *("receive 0", "sample 0", "sample 0"),
        *("receive 2", "sample 2", "sample 2"),
    ]
    seeds = [request.seed for request in engines.requests]
    assert len(set(seeds)) == len(seeds)
    again, _, same, _ = set_up()
    same.reply = engines.reply
    assert (prompts(again, 1), prompts(again, 2)) == (first, second)
    assert [request.seed for request in same.requests] == seeds


def test_the_teacher_may_write_instead() -> None:
    collector, _, _, events = set_up("co_rewarding_i+ii", **{"data.online_rephrasing": "teacher"})
    assert GOOD in prompts(collector)["fake/0", "rephrased"]
    assert [e for e in events if e.startswith(("receive", "sample"))] == [
        *("receive 1", "sample 1", "sample 1"),  # rewritings, labels
        *("receive 0", "sample 0"),
    ]


def test_a_logged_step_is_trained_on_the_texts_that_it_was_drawn_for(tmp_path: Path) -> None:
    collector, _, _, _ = set_up(log=RolloutLog(tmp_path, "same", 1, keep=True))
    drawn = prompts(collector)
    resumed, rewriter, engines, _ = set_up(log=RolloutLog(tmp_path, "same", 1, keep=True))
    engines.reply = lambda version: "another model would write something else"
    assert prompts(resumed) == drawn
    assert engines.requests == []
    assert rewriter.metrics() == {}


def test_ground_truths_have_no_part_in_it() -> None:
    problems: list[Problem] = [replace(make_problem(i), ground_truth="noise") for i in range(2)]
    first, _, engines, _ = set_up()
    second, rewriter, others, _ = set_up()
    rewriter.given = lambda step: problems
    assert prompts(first) == prompts(second)
    assert [r.seed for r in engines.requests] == [r.seed for r in others.requests]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("empo", {}, "policy, but method empo reads no rephrased questions; allowed: off"),
        ("co_rewarding_i", {"data.online_rephrasing": "teacher"}, "teacher, but method co_rewarding_i keeps none"),
        (
            "co_rewarding_i",
            {"rollout.max_staleness": 1, "loss.mismatch_correction": "tis"},
            "rollout.max_staleness must be 0, found 1",
        ),
        ("co_rewarding_i+ii", {"teacher.lookahead": 2}, "teacher.lookahead must be 0, found 2"),
    ],
)
def test_what_cannot_work_is_refused(method: str, changes: dict[str, Any], message: str) -> None:
    (problem,) = setting_problems(make_config(method, **{"data.online_rephrasing": "policy"} | changes))
    assert problem.startswith("data.online_rephrasing: ")
    assert message in problem
