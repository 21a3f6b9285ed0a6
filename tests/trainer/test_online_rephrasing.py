"""Questions that a model rewrites for every step: what is asked and when, what is taken over, what a resume sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.cluster.group_stream import GroupStream
from megatron_coreward.cluster.rollout_engines import RolloutEngines, Side
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.data.parquet import Message
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.rollout_dump import rollouts_path
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.online_rephrasing import RephrasedSource, Rewriter, Rewriting
from megatron_coreward.trainer.rollout_log import LoggedCollector, RolloutLog
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.trainer.streaming import StreamingSchedule
from megatron_coreward.types import Completion, Problem
from tests.trainer.fakes import FakeActors, FakeEngines, make_config, make_problem
from tests.trainer.stream_fakes import StreamingFakes
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
    dies = False  # as soon as it is asked for rewritings, once

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]:
        if not self.dies or any(request.n > 1 for request in requests):
            return super().begin_sampling(requests, expected_version)
        self.dies = False

        def finish() -> list[list[Completion]]:
            raise WorkerDied("engine", 0, "rollouts", RuntimeError("gone"))

        return finish

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        found = super().sample(requests, expected_version)
        for request, completions in zip(requests, found, strict=True):
            if request.n == 1:
                completions[0] = replace(
                    completions[0], text=self.reply(expected_version), finish_reason=self.finish_reason
                )
        return found


class WritingStream(WritingEngines, StreamingFakes):
    """The same, of engines to which groups are streamed."""


def in_words(version: int) -> str:
    """A rewriting that tells, without a number of its own, how many updates the weights had that wrote it."""
    return f"<rewritten>{GOOD} Written by {'new ' * (version // 2)}weights.</rewritten>"


def set_up(
    method: str = "co_rewarding_i",
    log: RolloutLog | None = None,
    engines: WritingEngines | None = None,
    more_of_engines: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Collector | LoggedCollector, Rewriter, WritingEngines, list[str]]:
    """`more_of_engines`: further arguments of `RolloutEngines`."""
    engines = engines or WritingEngines([])
    actors = FakeActors(engines.events)
    settings = {"data.online_rephrasing": "policy", "rollout.max_response_tokens": 2000} | changes
    config, problems = make_config(method, **settings), [make_problem(0), make_problem(1)]
    rollout_engines = RolloutEngines(engines, make_sync(actors, engines), **(more_of_engines or {}))
    logged = (lambda step: False) if log is None else log.has
    questions = {uid: (Message(role="user", content=text),) for uid, text in QUESTIONS.items()}
    role = config.data.online_rephrasing
    assert role != "off"
    rewriter = Rewriter(config, Rewriting(role, rollout_engines, TOKENIZER, questions), lambda step: problems, logged)
    schedule = StreamingSchedule if config.rollout.schedule == "streaming" else RolloutSchedule
    source = RephrasedSource(
        schedule(config, METHODS[method].needs, rollout_engines, rewriter.problems_of, logged), rewriter
    )
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
    rewriting, rollouts = engines.requests[:2], engines.requests[2:6]
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


def written_by(asked: Mapping[tuple[str, str], str]) -> int:
    """How many updates the weights had that wrote the rephrasing of the first question."""
    assert "weights." in asked["fake/0", "rephrased"]
    return asked["fake/0", "rephrased"].count("new ")


def asked_and_sampled(events: list[str]) -> list[str]:
    return [e for e in events if e.split()[0] in ("receive", "sample", "took", "learn", "restart", "handoff")]


def learn_from(collector: Collector | LoggedCollector, steps: Sequence[int], events: list[str]) -> list[int]:
    """Takes these steps; who wrote the questions of each (`written_by`)."""
    writers = []
    for step in steps:
        writers.append(written_by(prompts(collector, step)))
        events.append("learn")
    return writers


def outcome(collector: Collector | LoggedCollector, step: int) -> tuple[dict[tuple[str, str], str], set[Any], int]:
    """What a step is trained on: texts, versions of the weights that drew it, and how often weights were synced."""
    rollouts = collector.collect(step, step - 1, PhaseTimer()).rollouts
    groups = [*rollouts.policy, *rollouts.teacher]
    versions = {(g.uid, g.view, g.role, c.weight_version) for g in groups for c in g.completions}
    return {(g.uid, g.view): g.prompt.text for g in groups}, versions, len(rollouts.syncs)


def test_a_step_is_rewritten_while_the_actors_learn_from_the_one_before() -> None:
    collector, _, engines, events = set_up(steps=3)
    engines.reply = in_words
    assert learn_from(collector, (1, 2, 3), events) == [0, 0, 1]  # by weights of one update less, after the first step
    assert asked_and_sampled(events) == [
        *("receive 0", "sample 0", "took 0"),  # the first step's rewritings, for which it waits
        *("sample 0", "took 0", "sample 0", "learn"),  # its rollouts, and the second step's rewritings
        *("took 0", "receive 2", "sample 2", "took 2", "sample 2", "learn"),
        *("took 2", "receive 4", "sample 4", "took 4", "learn"),  # nothing comes after the last step
    ]


def test_who_writes_is_repeatable_and_every_seed_is_drawn_with_once() -> None:
    def run() -> tuple[list[dict[tuple[str, str], str]], list[int]]:
        collector, _, engines, _ = set_up(steps=3)
        engines.reply = in_words
        return [prompts(collector, step) for step in (1, 2, 3)], [request.seed for request in engines.requests]

    texts, seeds = run()
    assert len(set(seeds)) == len(seeds) == 3 * (2 + 4)  # rewritings, and both views of both questions
    assert run() == (texts, seeds)


def test_only_the_wait_for_rewritings_is_the_phase_rephrasing() -> None:
    collector, _, _, events = set_up()
    for step in (1, 2):
        collector.collect(step, step - 1, PhaseTimer(lambda phase: events.append(f"phase {phase}")))
    assert [e for e in events if e.startswith(("sample", "took", "phase rephrasing"))] == [
        *("sample 0", "phase rephrasing", "took 0", "sample 0", "took 0", "sample 0"),
        *("phase rephrasing", "took 0", "sample 2", "took 2", "sample 2"),
    ]


def test_nothing_is_rewritten_before_a_checkpoint_for_the_step_after_it() -> None:
    collector, _, engines, events = set_up(steps=6, **{"checkpoint.every": 2})
    engines.reply = in_words
    assert learn_from(collector, range(1, 7), events) == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("role", ["policy", "teacher"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_run_that_goes_on_from_a_checkpoint_asks_for_what_an_uninterrupted_one_asked_for(
    every: int, role: str
) -> None:
    """Same texts, seeds, versions of the weights and weight syncs, wherever a run of seven steps is cut."""

    def attempt(steps: range) -> list[Any]:
        others = WritingEngines([])
        teacher = {"teacher": Side(others, make_sync(FakeActors([]), others))}
        collector, _, engines, _ = set_up(
            "co_rewarding_i+ii",
            more_of_engines=teacher,
            **{"steps": 7, "checkpoint.every": every, "data.online_rephrasing": role},
        )
        engines.reply = others.reply = in_words
        return [outcome(collector, step) for step in steps]

    whole = attempt(range(1, 8))
    writers = [written_by(texts) for texts, _, _ in whole]
    assert writers == [step - 1 if (step - 1) % every == 0 else step - 2 for step in range(1, 8)]
    for checkpoint in range(every, 7, every):
        assert attempt(range(checkpoint + 1, 8)) == whole[checkpoint:]


@pytest.mark.parametrize("died_in", [1, 2, 3, 4])
def test_a_run_that_goes_on_from_its_rollout_log_has_later_steps_rewritten_by_the_same_weights(
    tmp_path: Path, died_in: int
) -> None:
    def attempt() -> tuple[Collector | LoggedCollector, WritingEngines]:
        log = RolloutLog(tmp_path, "same", 1, keep=True)
        collector, _, engines, _ = set_up(log=log, steps=5)
        engines.reply = in_words
        return collector, engines

    whole, first = attempt()
    expected = [outcome(whole, step) for step in range(1, 6)]
    for step in range(died_in + 1, 6):
        rollouts_path(tmp_path, step).unlink()
    again, second = attempt()
    assert [outcome(again, step) for step in range(1, 6)] == expected
    assert [r.seed for r in second.requests] == [r.seed for r in first.requests][-6 * (5 - died_in) :]


def test_rewritings_that_an_engine_took_with_it_are_written_by_the_weights_of_the_step() -> None:
    engines = WritingEngines([])
    collector, rewriter, _, events = set_up(engines=engines, more_of_engines={"max_restarts": 1}, steps=4)
    engines.reply = in_words
    assert learn_from(collector, (1,), events) == [0]
    engines.dies = True
    assert learn_from(collector, (2,), events) == [0]  # begins the third step's rewritings, which will not come
    events.clear()
    assert learn_from(collector, (3,), events) == [2]
    assert asked_and_sampled(events) == [
        *("restart 0", "receive 4", "sample 4", "took 4"),
        *("sample 4", "took 4", "sample 4", "learn"),
    ]
    rollout_engines: Any = rewriter.by.engines
    rollout_engines._sides["policy"].sync.reset()  # an engine died in a validation, say
    assert learn_from(collector, (4,), events) == [3]


@contextmanager
def handoff(events: list[str]) -> Iterator[None]:
    events.append("handoff begins")
    yield
    events.append("handoff ends")


def test_engines_that_sleep_while_the_actors_learn_write_at_the_beginning_of_the_step() -> None:
    engines = WritingEngines([])
    colocation = {"colocation": lambda timer: handoff(engines.events)}
    collector, _, _, events = set_up(engines=engines, more_of_engines=colocation, **{"rollout.placement": "colocated"})
    engines.reply = in_words
    assert learn_from(collector, (1, 2), events) == [0, 1]
    rewriting_and_rollouts = ["handoff begins", "receive 2", "sample 2", "took 2", "handoff ends"] * 2
    assert asked_and_sampled(events)[-11:] == [*rewriting_and_rollouts, "learn"]


def test_a_teacher_that_shares_the_engines_writes_at_the_beginning_of_the_step() -> None:
    collector, _, engines, events = set_up("co_rewarding_i+ii", **{"data.online_rephrasing": "teacher"})
    engines.reply = in_words
    assert learn_from(collector, (1, 2), events) == [0, 1]
    assert asked_and_sampled(events)[-9:] == [
        *("receive 3", "sample 3", "took 3", "sample 3", "took 3"),  # rewritings, labels
        *("receive 2", "sample 2", "took 2", "learn"),
    ]


@pytest.mark.timeout(60)
def test_streamed_groups_are_rewritten_ahead_across_checkpoints_too() -> None:
    engines = WritingStream([])
    engines.reply = in_words
    side = Side(engines, make_sync(FakeActors(engines.events), engines), GroupStream(engines, 12, Watchdog()))
    changes = {"rollout.schedule": "streaming", "checkpoint.every": 1, "steps": 4}
    collector, _, _, events = set_up(engines=engines, more_of_engines={"policy": side}, **changes)
    try:
        assert learn_from(collector, (1, 2, 3, 4), events) == [0, 0, 1, 2]
    finally:
        assert side.stream is not None
        side.stream.close()
    assert set(engines.drawn.values()) == {1}
    assert [e for e in asked_and_sampled(events) if not e.startswith("receive")] == [
        *("sample 0", "took 0", "sample 0", "learn"),
        *("took 0", "sample 2", "learn"),
        *("took 2", "sample 4", "learn"),
        *("took 4", "learn"),
    ]


def test_a_logged_step_is_trained_on_the_texts_that_it_was_drawn_for(tmp_path: Path) -> None:
    collector, _, _, _ = set_up(log=RolloutLog(tmp_path, "same", 1, keep=True), steps=1)
    drawn = prompts(collector)
    resumed, rewriter, engines, _ = set_up(log=RolloutLog(tmp_path, "same", 1, keep=True), steps=1)
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
