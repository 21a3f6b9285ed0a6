"""An engine that dies is started again, gets the weights, and is asked again; anything else ends the run."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from megatron_coreward.cluster.watchdog import Kind, WorkerDied
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.types import Completion
from megatron_coreward.weights.spec import Transport
from tests.trainer.fakes import SPEC, FakeActors, FakeEngines
from tests.trainer.test_loop import make_sync, make_trainer, story


class MortalEngines(FakeEngines):
    deaths: list[Kind]

    def sample(self, requests: Any, expected_version: int) -> list[list[Completion]]:
        if self.deaths:
            raise WorkerDied(self.deaths.pop(0), 1, "rollouts", ConnectionError("gone"))
        return super().sample(requests, expected_version)


def trainer_with_deaths(
    deaths: list[Kind],
    max_restarts: int,
    transport: Transport = "shared_memory",
    given_up: list[str] | None = None,
) -> tuple[Trainer, list[str], list[str], MortalEngines]:
    actors, notes = FakeActors([]), list[str]()
    engines = MortalEngines(actors.events)
    engines.deaths = deaths
    sync = make_sync(actors, engines, given_up, spec=replace(SPEC, transport=transport))
    more = {"max_restarts": max_restarts, "notify": notes.append}
    trainer, events, _, _ = make_trainer(
        "co_rewarding_ii", actors=actors, engines=engines, sync=sync, more_of_engines=more
    )
    return trainer, events, notes, engines


def test_weights_are_synced_again_and_the_same_requests_are_made_again() -> None:
    trainer, events, notes, engines = trainer_with_deaths(["engine"], 1)
    result = trainer.step(1, PhaseTimer())
    assert [e for e in events if e.split()[0] in ("restart", "receive", "sample")] == [
        "receive 1",
        "restart 1",
        "receive 1",
        "sample 1",
        "receive 0",
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


@pytest.mark.parametrize("transport", get_args(Transport))
def test_a_death_while_weights_travel_makes_the_others_give_up_and_all_meet_again(transport: Transport) -> None:
    given_up: list[str] = []
    trainer, events, _, engines = trainer_with_deaths([], 1, transport, given_up)
    receive = engines.receive_weights

    def die(spec: Any, version: int) -> Any:
        engines.receive_weights = receive  # type: ignore[method-assign]
        raise WorkerDied("engine", 1, "weights", ConnectionError("gone"))

    engines.receive_weights = die  # type: ignore[method-assign]
    trainer.step(1, PhaseTimer())
    assert "engine 1 died" in given_up[0]
    assert [event for event in events if event in ("open", "restart 1")] == ["open", "restart 1", "open"]


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
