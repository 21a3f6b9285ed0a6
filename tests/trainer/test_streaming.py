"""Streamed rollouts: nothing lost, nothing drawn twice, no token too old, whatever dies when."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.checkpoint.store import TrainerState
from megatron_coreward.cluster.group_stream import GroupStream
from megatron_coreward.cluster.rollout_engines import Side
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.data.sampler import BatchSampler
from megatron_coreward.rollout.requests import GroupName
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, rollouts_path
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollout_log import RolloutLog
from megatron_coreward.trainer.staleness import token_ages
from tests.trainer.fakes import FakeActors, make_problem
from tests.trainer.stream_fakes import StreamingFakes
from tests.trainer.test_loop import make_sync, make_trainer

pytestmark = pytest.mark.timeout(120)

STREAM = {"rollout.schedule": "streaming", "loss.mismatch_correction": "tis"}
AHEAD = STREAM | {"rollout.max_staleness": 2, "rollout.partial": "true"}
EPOCH = 7  # questions; with two a step, a batch crosses the border of each epoch but the second


class Run:
    """Attempts of a run over fakes."""

    def __init__(self, method: str = "majority_voting", **changes: Any) -> None:
        self.method, self.changes = method, changes
        problems = [make_problem(i) for i in range(EPOCH)]
        self.batch = BatchSampler(problems, 2, seed=1, shuffle=True).batch
        self.events: list[str] = []

    @contextmanager
    def attempt(
        self,
        done: int = 0,
        log: RolloutLog | None = None,
        room: int = 12,
        own: bool = False,
        restarts: int = 100,
        colocated: bool = False,
    ) -> Iterator[tuple[Trainer, StreamingFakes, StreamingFakes]]:
        """A trainer, the engines that draw for the policy, and those that draw for the teacher."""
        actors = FakeActors(self.events)
        engines = StreamingFakes(self.events)
        sync = make_sync(actors, engines)
        policy = teacher = Side(engines, sync, GroupStream(engines, room, Watchdog()))
        others = engines
        more: dict[str, Any] = {"policy": policy, "max_restarts": restarts}
        if own:
            others = StreamingFakes(self.events, 1, first=2)
            teacher = more["teacher"] = Side(others, make_sync(actors, others), GroupStream(others, room, Watchdog()))
        if colocated:

            @contextmanager
            def handoff(timer: PhaseTimer) -> Iterator[None]:
                try:
                    yield
                finally:
                    engines.sleep()

            more["colocation"] = handoff
        more["partial"] = self.changes.get("rollout.partial") == "true"
        trainer, *_ = make_trainer(
            self.method,
            actors=actors,
            engines=engines,
            sync=sync,
            more_of_engines=more,
            log=log,
            problems_of=self.batch,
            more={"state": TrainerState(done, done, teacher_updates=done)},
            **{"steps": 40} | self.changes,
        )
        try:
            yield trainer, engines, others
        finally:
            for side in {id(side): side for side in (policy, teacher)}.values():
                assert side.stream is not None
                side.stream.close()

    def check(self, step: int, scored: list[ScoredGroup], trained: int | None = None) -> None:
        """The step learns from its own questions, whole groups, and no token is too old."""
        policy = [item.group for item in scored if item.rewards is not None]
        assert [group.uid for group in policy] == [problem.uid for problem in self.batch(step - 1)]
        assert {len(group.completions) for group in policy} == {4}
        ages = token_ages(policy, step - 1, 1)
        assert ages.min() >= 0
        assert ages.max() <= int(self.changes.get("rollout.max_staleness", 0))


@pytest.mark.parametrize("method", ["majority_voting", "co_rewarding_ii"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "changes", [STREAM, STREAM | {"rollout.max_staleness": 1}, STREAM | {"rollout.max_staleness": 2}, AHEAD]
)
def test_every_question_is_learnt_from_once_and_no_token_is_too_old(
    method: str, own: bool, changes: dict[str, Any]
) -> None:
    run = Run(method, **changes)
    with run.attempt(own=own) as (trainer, engines, others):
        rows = []
        for step in range(1, 2 * EPOCH + 1):
            result = trainer.step(step, PhaseTimer())
            run.check(step, result.scored)
            rows.append(result.metrics)
            teachers = [item.group for item in result.scored if item.rewards is None]
            assert len(teachers) == (2 if method == "co_rewarding_ii" else 0)
            versions = {v for group in teachers for c in group.completions for v in c.token_versions.tolist()}
            assert all(version % 2 for version in versions)
    assert set((engines.drawn + others.drawn).values()) == {1} or engines is others
    assert set(engines.drawn.values()) == {1}
    staleness = int(changes.get("rollout.max_staleness", 0))
    assert max(row.get("rollout/staleness_max", 0) for row in rows) == staleness
    continued = max(row.get("rollout/continued_share", 0) for row in rows)
    assert (continued > 0) == ("rollout.partial" in changes)


@pytest.mark.parametrize(
    ("changes", "colocated"),
    [(STREAM, False), (STREAM, True), (STREAM | {"rollout.max_staleness": 2}, False), (AHEAD, False)],
)
@pytest.mark.parametrize("method", ["majority_voting", "co_rewarding_ii"])
def test_engines_that_die_cost_only_what_had_not_ended(method: str, changes: dict[str, Any], colocated: bool) -> None:
    """Ten deaths and more, anywhere: while a step waits, while the actors learn, while weights travel."""
    run, rng = Run(method, **changes), random.Random(3)
    with run.attempt(colocated=colocated) as (trainer, engines, _):
        countdown, deaths = 25, 0

        def on_ended() -> None:
            nonlocal countdown, deaths
            countdown -= 1
            if countdown == 0:
                countdown = rng.randrange(10, 30)
                deaths += 1
                engines.kill(rng.randrange(2))

        engines.on_ended = on_ended
        for step in range(1, 41):
            run.check(step, trainer.step(step, PhaseTimer()).scored)
    assert deaths >= 10
    # A sample whose end an engine could not tell any more is drawn again: those of one engine, at each death.
    assert sum(engines.drawn.values()) <= len(engines.drawn) + 12 * deaths
    assert len(engines.drawn) == 40 * 2 * 4 + (40 * 2 * 3 if method == "co_rewarding_ii" else 0)


class Killed(Exception):
    """The end of an attempt."""


def killed(*arguments: object) -> None:
    raise Killed


@pytest.mark.parametrize("method", ["majority_voting", "co_rewarding_ii"])
def test_a_run_that_is_killed_again_and_again_learns_from_every_question_once(method: str, tmp_path: Path) -> None:
    """Ten kills, between steps, before a step is in the rollout log and in its update: at each, the run goes on from
    the newest checkpoint (every third step) and from its rollout log."""
    run, rng = Run(method, **AHEAD), random.Random(5)
    saved, reached, learnt = 0, 0, dict[int, list[ScoredGroup]]()
    for number in range(11):
        log = RolloutLog(tmp_path, "f", first_step=saved + 1, keep=True)
        known = set(range(saved + 1, saved + 1 + log.num_recorded))
        last = min(reached + rng.randrange(1, 5), 40)
        with run.attempt(done=saved, log=log) as (trainer, engines, _):
            for step in range(saved + 1, last + 1):
                learnt[step] = trainer.step(step, PhaseTimer()).scored
                run.check(step, learnt[step])
            assert not {name.step for name in engines.fed} & known
            if number % 3 and last < 40:  # it dies within the step
                dies: Any = log if number % 3 == 1 else trainer.actors
                setattr(dies, "write" if dies is log else "update", killed)
                with pytest.raises(Killed):
                    trainer.step(last + 1, PhaseTimer())
                assert log.has(last + 1) == (dies is not log)
        assert last > reached
        reached, saved = last, last - last % 3
    assert sorted(learnt) == list(range(1, reached + 1))
    assert reached > 2 * EPOCH


def test_a_logged_step_that_cannot_be_read_is_drawn_while_later_ones_are_in_flight(tmp_path: Path) -> None:
    run = Run("co_rewarding_ii", **STREAM | {"rollout.max_staleness": 2})
    with run.attempt(log=RolloutLog(tmp_path, "f", first_step=1, keep=True)) as (trainer, _, _):
        for step in (1, 2):
            trainer.step(step, PhaseTimer())
    log = RolloutLog(tmp_path, "f", first_step=1, keep=True)
    assert log.num_recorded == 2
    with run.attempt(log=log) as (trainer, engines, _):
        trainer.step(1, PhaseTimer())
        assert {name.step for name in engines.fed} == {3}
        rollouts_path(tmp_path, 2).unlink()
        for step in (2, 3, 4):
            run.check(step, trainer.step(step, PhaseTimer()).scored)


def test_a_teacher_with_engines_of_its_own_goes_on_while_the_policys_groups_are_in_flight() -> None:
    run = Run("co_rewarding_ii", **STREAM | {"rollout.max_staleness": 2})
    with run.attempt(own=True) as (trainer, engines, others):
        engines.held_step = 3
        trainer.step(1, PhaseTimer())
        schedule: Any = trainer.collect.__self__.source  # type: ignore[attr-defined]
        schedule.engines.wait([GroupName(step, "teacher", place) for step in (2, 3) for place in (0, 1)], PhaseTimer())
        assert schedule.engines.in_flight("policy")
        trainer.step(2, PhaseTimer())
        assert {name.step for name in others.fed} == {1, 2, 3, 4}
        engines.held_step = None
        for step in (3, 4, 5):
            run.check(step, trainer.step(step, PhaseTimer()).scored)


def test_what_was_drawn_ahead_of_a_checkpoint_is_drawn_again_by_a_run_that_resumes_there(tmp_path: Path) -> None:
    run = Run(**AHEAD)
    with run.attempt() as (trainer, engines, _):
        trainer.step(1, PhaseTimer())
        assert {name.step for name in engines.fed} >= {1, 2}
    with run.attempt(done=1, log=RolloutLog(tmp_path, "f", first_step=2, keep=True)) as (trainer, engines, _):
        result = trainer.step(2, PhaseTimer())
        run.check(2, result.scored)
        assert {c.weight_version for item in result.scored for c in item.group.completions} == {2}


@pytest.mark.parametrize("changes", [STREAM | {"rollout.max_staleness": 1}, AHEAD])
def test_a_validation_in_between_neither_loses_nor_stalls_what_is_in_flight(changes: dict[str, Any]) -> None:
    run = Run(**changes)
    with run.attempt() as (trainer, fakes, _):
        engines: Any = trainer.collect.__self__.source.engines  # type: ignore[attr-defined]
        for step in range(1, 8):
            run.check(step, trainer.step(step, PhaseTimer()).scored)
            engines.run(partial(engines.sync_weights, "policy", step, PhaseTimer()), PhaseTimer())
    assert set(fakes.drawn.values()) == {1}


def test_one_sync_of_each_role_a_step_if_the_teacher_has_engines_of_its_own() -> None:
    run = Run("co_rewarding_ii", **AHEAD)
    with run.attempt(own=True) as (trainer, _, _):
        for step in range(1, 6):
            run.events.clear()
            trainer.step(step, PhaseTimer())
            assert [e for e in run.events if e.startswith("receive")] == [
                f"receive {2 * step - 1}",
                f"receive {2 * step - 2}",
            ]
