"""What is sampled when: rollouts a step ahead, a teacher that labels several steps at once, what a resume sees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.cluster.rollout_engines import Side
from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.config.schema import AnswerFormat, ValidationSettings
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.telemetry.rollout_dump import rollouts_path
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollout_log import RolloutLog
from megatron_coreward.trainer.validation import measure_accuracy
from tests.trainer.fakes import FakeActors, FakeEngines, make_problem
from tests.trainer.test_loop import make_sync, make_trainer

STALE = {"rollout.max_staleness": 1, "loss.mismatch_correction": "tis", "steps": 4}


def drawn(engines: FakeEngines) -> list[tuple[Any, ...]]:
    return [(tuple(r.prompt), r.seed, r.n) for r in engines.requests]


def only(events: list[str], *words: str) -> list[str]:
    return [e for e in events if e.split()[0] in words]


def test_rollouts_are_in_flight_while_the_actors_learn_from_those_before() -> None:
    trainer, events, _, _ = make_trainer("majority_voting", **STALE)
    rows = [trainer.step(step, PhaseTimer()).metrics for step in (1, 2, 3, 4)]
    assert only(events, "receive", "sample", "took", "update") == [
        *(
            "receive 0",
            "sample 0",
            "took 0",
            "sample 0",
            "update",
        ),  # the second step's rollouts begin early
        *("took 0", "receive 2", "sample 2", "update"),
        *("took 2", "receive 4", "sample 4", "update"),
        *("took 4", "update"),  # nothing comes after the last step
    ]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1]


def test_the_same_questions_and_seeds_are_drawn_ahead_as_in_time() -> None:
    ahead, in_time = make_trainer("co_rewarding_ii", **STALE), make_trainer("co_rewarding_ii", steps=4)
    for trainer, *_ in (ahead, in_time):
        for step in (1, 2, 3, 4):
            trainer.step(step, PhaseTimer())
    assert drawn(ahead[3]) == drawn(in_time[3])


def test_answers_are_read_in_the_forms_that_are_asked_for() -> None:
    def answers(*forms: str) -> set[str | None]:
        trainer, _, _, engines = make_trainer("co_rewarding_ii", **{"rewards.answer_formats": list(forms)})
        engines._sample = lambda i, version: replace(FakeEngines._sample(i, version), text="thus #### 7")  # type: ignore[method-assign]
        return {answer for item in trainer.step(1, PhaseTimer()).scored for answer in item.group.answers}

    assert answers("boxed", "hashes") == {"7"}  # of the policy and of the teacher
    assert answers("boxed") == {None}


def test_validation_reads_answers_in_the_forms_that_are_asked_for() -> None:
    _, _, _, engines = make_trainer("majority_voting")
    engines._sample = lambda i, version: replace(FakeEngines._sample(i, version), text="thus #### 7")  # type: ignore[method-assign]
    engines.version = 0
    problems, settings = [replace(make_problem(0), ground_truth="7")], ValidationSettings(n=4)

    def accuracy(*forms: AnswerFormat) -> float:
        how = {"max_tokens": 8, "version": 0, "seed": 1}
        equivalence = AnswerEquivalence("exact")
        scores = measure_accuracy(engines, {"fake": problems}, settings, equivalence, **how, answer_formats=forms)
        return scores["val/avg@4"]

    assert (accuracy("hashes"), accuracy("boxed")) == (1.0, 0.0)


def test_nothing_goes_ahead_across_a_checkpoint() -> None:
    trainer, events, _, _ = make_trainer("majority_voting", **STALE, **{"checkpoint.every": 2})
    rows = [trainer.step(step, PhaseTimer()).metrics for step in (1, 2, 3, 4)]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 0, 1]
    assert only(events, "sample") == ["sample 0", "sample 0", "sample 4", "sample 4"]


def test_an_engine_that_dies_with_rollouts_in_flight_costs_the_lead_alone() -> None:
    engines = FakeEngines([])
    begin = engines.begin_sampling

    def begin_and_die(requests: Any, version: int) -> Any:
        begin(requests, version)

        def finish() -> Any:
            engines.begin_sampling = begin  # type: ignore[method-assign]
            raise WorkerDied("engine", 0, "rollouts", RuntimeError("gone"))

        return finish

    actors = FakeActors(engines.events)
    trainer, events, _, _ = make_trainer(
        "majority_voting", actors=actors, engines=engines, more_of_engines={"max_restarts": 1}, **STALE
    )
    trainer.step(1, PhaseTimer())
    engines.begin_sampling = begin_and_die  # type: ignore[method-assign]
    trainer.step(2, PhaseTimer())  # begins the third step's rollouts, which will not come
    events.clear()
    row = trainer.step(3, PhaseTimer()).metrics
    assert row["rollout/staleness"] == 0
    assert only(events, "restart", "sample", "took", "update") == [
        *("restart 0", "sample 4", "took 4", "sample 4", "update"),
    ]


def test_rollouts_of_engines_that_were_started_again_are_drawn_again() -> None:
    actors = FakeActors([])
    engines = FakeEngines(actors.events)
    sync = make_sync(actors, engines)
    trainer, events, _, _ = make_trainer("majority_voting", actors=actors, engines=engines, sync=sync, **STALE)
    trainer.step(1, PhaseTimer())
    sync.reset()  # an engine died in a validation, say
    events.clear()
    row = trainer.step(2, PhaseTimer()).metrics
    assert row["rollout/staleness"] == 0
    assert only(events, "sample", "took")[:2] == ["sample 2", "took 2"]


@pytest.mark.parametrize(
    ("every", "windows"),
    [(0, [[1, 2, 3], [4, 5, 6], [7]]), (5, [[1, 2, 3], [4, 5], [6, 7]]), (2, [[1, 2], [3, 4], [5, 6], [7]])],
)
def test_a_teacher_that_looks_ahead_labels_windows_between_checkpoints(every: int, windows: list[list[int]]) -> None:
    changes = {"teacher.lookahead": 2, "steps": 7, "checkpoint.every": every}
    trainer, events, _, engines = make_trainer("co_rewarding_ii", **changes)
    results = [trainer.step(step, PhaseTimer()) for step in range(1, 8)]
    teachers = [[i.group for i in result.scored if i.rewards is None] for result in results]
    assert [len(groups) for groups in teachers] == [2] * 7
    for window in windows:
        versions = {c.weight_version for step in window for g in teachers[step - 1] for c in g.completions}
        assert versions == {2 * (window[0] - 1) + 1}
    assert len(only(events, "receive")) == 7 + len(windows)
    in_time = make_trainer("co_rewarding_ii", steps=7)
    for step in range(1, 8):
        in_time[0].step(step, PhaseTimer())
    assert sorted(drawn(engines)) == sorted(drawn(in_time[3]))


@pytest.mark.parametrize("changes", [{}, STALE, {"teacher.lookahead": 1}])
def test_a_teacher_with_engines_of_its_own_draws_at_once_what_it_would_draw_before(changes: dict[str, Any]) -> None:
    actors = FakeActors([])
    own, others = FakeEngines([]), FakeEngines(actors.events)
    teacher = Side(own, make_sync(actors, own))
    trainer, events, _, _ = make_trainer(
        "co_rewarding_ii", actors=actors, engines=others, more_of_engines={"teacher": teacher}, **{"steps": 4} | changes
    )
    own.events = events
    for step in (1, 2, 3, 4):
        trainer.step(step, PhaseTimer())
    first = ["receive 1", "sample 1", "receive 0", "sample 0", "took 1", "took 0"]  # both are at work at once
    assert only(events, "receive", "sample", "took")[:6] == first
    if changes == STALE:  # and while the actors learn
        assert only(events, "sample", "took", "update")[4:10] == [
            *("sample 1", "sample 0", "update"),
            *("took 1", "took 0", "sample 3"),
        ]
    shared = make_trainer("co_rewarding_ii", **{"steps": 4} | changes)
    for step in (1, 2, 3, 4):
        shared[0].step(step, PhaseTimer())
    assert sorted(drawn(own) + drawn(others)) == sorted(drawn(shared[3]))
    assert {n for _, _, n in drawn(own)} == {3}


def test_a_step_in_the_log_that_cannot_be_read_is_drawn_although_nothing_was_begun_for_it(tmp_path: Path) -> None:
    def attempt() -> Trainer:
        log = RolloutLog(tmp_path, "the same", first_step=1, keep=True)
        return make_trainer("co_rewarding_ii", log=log, **STALE)[0]

    whole = attempt()
    for step in (1, 2, 3):
        whole.step(step, PhaseTimer())
    again = attempt()
    again.step(1, PhaseTimer())
    rollouts_path(tmp_path, 2).unlink()
    assert {(i.group.role, len(i.group.completions)) for i in again.step(2, PhaseTimer()).scored} == {
        ("policy", 4),
        ("teacher", 3),
    }


@pytest.mark.parametrize("changes", [{"teacher.lookahead": 2}, STALE, STALE | {"teacher.lookahead": 1}])
@pytest.mark.parametrize("died_in", [1, 2, 3, 4, 5])
def test_a_run_that_goes_on_from_its_rollout_log_draws_what_was_not_drawn_from_the_same_weights(
    tmp_path: Path, changes: dict[str, Any], died_in: int
) -> None:
    """A step whose rollouts are recorded, and whose update is not, is where the run died."""

    def attempt() -> tuple[Trainer, FakeEngines]:
        log = RolloutLog(tmp_path, "the same", first_step=1, keep=True)
        trainer, _, _, engines = make_trainer("co_rewarding_ii", log=log, **{**changes, "steps": 6})
        return trainer, engines

    def outcome(trainer: Trainer, steps: range) -> list[list[tuple[Any, ...]]]:
        return [
            [
                (i.group.uid, i.group.role, {c.weight_version for c in i.group.completions})
                for i in trainer.step(step, PhaseTimer()).scored
            ]
            for step in steps
        ]

    whole, _ = attempt()
    expected = outcome(whole, range(1, 7))
    for file in (tmp_path / "rollouts").iterdir():
        if int(file.stem.removeprefix("step_")) > died_in:
            file.unlink()
    again, engines = attempt()
    assert outcome(again, range(1, 7)) == expected
    assert len({seed for _, seed, _ in drawn(engines)}) == 4 * (6 - died_in)  # two questions, policy and teacher


def test_top_p_and_top_k_are_for_the_policys_training_rollouts_alone() -> None:
    trainer, _, _, engines = make_trainer(
        "co_rewarding_ii", **{"rollout.top_p": 0.9, "rollout.top_k": 20, "loss.mismatch_correction": "tis"}
    )
    trainer.step(1, PhaseTimer())
    assert {(r.n, r.top_p, r.top_k) for r in engines.requests} == {(3, 1.0, 0), (4, 0.9, 20)}  # teacher.n, rollout.n
