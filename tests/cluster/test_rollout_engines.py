"""An engine that dies is started again, gets the weights, and is asked again; anything else ends the run."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.cluster.watchdog import Kind, WorkerDied
from megatron_coreward.rollout.engine import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.types import Completion
from megatron_coreward.weights.route import Transport
from tests.trainer.fakes import ROUTE, FakeActors, FakeEngines
from tests.trainer.test_loop import make_sync, make_trainer, story


class MortalEngines(FakeEngines):
    deaths: list[Kind]

    def sample(self, requests: Any, expected_version: int) -> list[list[Completion]]:
        if self.deaths:
            raise WorkerDied(self.deaths.pop(0), 1, "rollouts", ConnectionError("gone"))
        return super().sample(requests, expected_version)


def trainer_with_deaths(
    deaths: list[Kind], max_restarts: int, transport: Transport = "shared_memory"
) -> tuple[Trainer, list[str], list[str], MortalEngines]:
    actors, notes = FakeActors([]), list[str]()
    engines = MortalEngines(actors.events)
    engines.deaths = deaths
    sync = make_sync(actors, engines, replace(ROUTE, transport=transport))
    more = {"max_restarts": max_restarts, "notify": notes.append}
    trainer, events, _, _ = make_trainer(
        "co_rewarding_ii", actors=actors, engines=engines, sync=sync, more_of_engines=more
    )
    return trainer, events, notes, engines


def test_weights_are_synced_again_and_the_same_requests_are_made_again() -> None:
    trainer, events, notes, engines = trainer_with_deaths(["engine"], 1)
    result = trainer.step(1, PhaseTimer())
    assert [e for e in events if e.split()[0] in ("restart", "finish", "sample")] == [
        "finish 1",
        "restart 1",
        "finish 1",
        "sample 1",
        "finish 0",
        "sample 0",
    ]
    assert "engine 1 died" in notes[0]
    undisturbed, _, _, reference = make_trainer("co_rewarding_ii")
    expected = undisturbed.step(1, PhaseTimer())
    assert [seed_of(r) for r in engines.requests] == [seed_of(r) for r in reference.requests]
    assert result.metrics["reward/mean"] == expected.metrics["reward/mean"]
    assert story(events)[-1] == "update"


def seed_of(request: SamplingRequest) -> tuple[int, tuple[int, ...]]:
    return request.seed, tuple(np.asarray(request.prompt).tolist())


@pytest.mark.parametrize(("transport", "goes_on"), [("shared_memory", True), ("gloo", True), ("nccl", False)])
def test_a_death_while_weights_travel_is_passed_on_where_others_hang_with_it(
    transport: Transport, goes_on: bool
) -> None:
    trainer, events, _, engines = trainer_with_deaths([], 1, transport)
    load = engines.load_bucket

    def die(bucket: int, version: int, hashes: Any) -> Any:
        engines.load_bucket = load  # type: ignore[method-assign]
        raise WorkerDied("engine", 1, "a bucket of weights", ConnectionError("gone"))

    engines.load_bucket = die  # type: ignore[method-assign]
    if goes_on:
        trainer.step(1, PhaseTimer())
    else:
        with pytest.raises(WorkerDied):
            trainer.step(1, PhaseTimer())
    assert ("restart 1" in events) is goes_on


@pytest.mark.parametrize(("restarts", "goes_on"), [(2, True), (1, False)])
def test_an_engine_that_dies_in_its_new_start_is_started_once_more(restarts: int, goes_on: bool) -> None:
    trainer, events, notes, engines = trainer_with_deaths(["engine"], restarts)
    restart, tries = engines.restart, []

    def die_once(index: int) -> None:
        tries.append(index)
        if len(tries) == 1:
            raise WorkerDied("engine", index, "its start", ConnectionError("gone"))
        restart(index)

    engines.restart = die_once  # type: ignore[method-assign]
    if goes_on:
        trainer.step(1, PhaseTimer())
        assert tries == [1, 1]
        assert story(events)[-1] == "update"
    else:
        with pytest.raises(WorkerDied, match="its start"):
            trainer.step(1, PhaseTimer())
    assert len(notes) == restarts


@pytest.mark.parametrize(("deaths", "restarts"), [(["engine", "engine"], 1), (["engine"], 0), (["actor rank"], 5)])
def test_a_death_too_many_or_of_a_rank_is_passed_on(deaths: list[Kind], restarts: int) -> None:
    trainer, events, _, _ = trainer_with_deaths(deaths, restarts)
    with pytest.raises(WorkerDied):
        trainer.step(1, PhaseTimer())
    assert "update" not in events
