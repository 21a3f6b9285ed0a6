"""Actors and engines on one card: who holds its memory when, and what is reported when it does not fit."""

import time
from typing import Any

import pytest

from megatron_coreward.cluster.colocation import Colocation
from megatron_coreward.cluster.preemption import Preempted
from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.errors import RunError
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import Trainer
from tests.trainer.fakes import FakeActors, FakeEngines
from tests.trainer.test_loop import make_sync, make_trainer

GIB = 2**30


class Card:
    """The memory of one GPU, and who holds how much of it."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, {"weights of the actor": 10 * GIB}

    def change(self, what: str, size: int) -> DeviceMemory:
        before = self.free
        self.held[what] = size
        assert self.free >= 0, f"out of memory: {self.held}"
        return DeviceMemory(self.free, self.free - before)

    @property
    def free(self) -> int:
        return self.total - sum(self.held.values())


class CardActors(FakeActors):
    def __init__(self, events: list[str], card: Card | None, state: int = 60 * GIB) -> None:
        super().__init__(events)
        self.card, self.state, self.whole = card, state, True
        if card is not None:
            card.change("state of the actor", state)

    def offload(self) -> DeviceMemory | None:
        self.events.append("offload")
        self.whole = False
        return self.card.change("state of the actor", 0) if self.card else None

    def onload(self) -> DeviceMemory | None:
        self.events.append("onload")
        self.whole = True
        return self.card.change("state of the actor", self.state) if self.card else None

    def update_ema_teacher(self, decay: float) -> None:
        assert self.whole
        super().update_ema_teacher(decay)

    def update(self, batch: Any) -> dict[str, float]:
        assert self.whole
        return super().update(batch)


class CardEngines(FakeEngines):
    WEIGHTS, CACHES = 10 * GIB, 50 * GIB

    def __init__(self, events: list[str], card: Card | None) -> None:
        super().__init__(events)
        self.card, self.awake = card, set[str]()

    def sleep(self) -> DeviceMemory | None:
        self.events.append("sleep")
        self.awake.clear()
        self.version = None
        if self.card is None:
            return None
        freed = self.card.change("weights of the engine", 0).freed
        memory = self.card.change("caches of the engine", 0)
        return DeviceMemory(memory.free, memory.freed + freed)

    def start_again(self) -> None:
        """In the place of one that died: awake, with memory for everything."""
        self.awake = {"weights", "kv_cache"}
        if self.card is not None:
            self.card.change("weights of the engine", self.WEIGHTS)
            self.card.change("caches of the engine", self.CACHES)

    def kill(self) -> None:
        self.events.append("kill")

    def wake(self, part: str) -> DeviceMemory | None:
        self.events.append(f"wake {part}")
        self.awake.add(part)
        size = {"weights": self.WEIGHTS, "kv_cache": self.CACHES}[part]
        whose = {"weights": "weights of the engine", "kv_cache": "caches of the engine"}[part]
        return self.card.change(whose, size) if self.card else None

    def receive_weights(self, spec: dict[str, Any], version: int, canary: Any) -> Any:
        assert "weights" in self.awake
        return super().receive_weights(spec, version, canary)

    def score(self, token_ids: Any) -> Any:
        assert self.awake == {"weights", "kv_cache"}
        return super().score(token_ids)


def colocated(card: Card | None, method: str = "co_rewarding_ii") -> tuple[Trainer, list[str], CardActors, Colocation]:
    actors = CardActors([], card)
    engines = CardEngines(actors.events, card)
    slept = [None if card is None else DeviceMemory(card.total, engines.WEIGHTS + engines.CACHES)]
    colocation = Colocation(actors, engines, slept)
    sync = make_sync(actors, engines, wake_caches=colocation.wake_caches)
    trainer, events, _, _ = make_trainer(
        method, actors=actors, engines=engines, sync=sync, more_of_engines={"colocation": colocation}
    )
    return trainer, events, actors, colocation


ORDER = [
    "teacher 0.9900",
    "offload",
    "wake weights",
    "receive 1",
    "wake kv_cache",
    "stats teacher",  # the canary
    "sample 1",
    "receive 0",
    "stats policy",  # the canary
    "sample 0",
    "sleep",
    "onload",
    "stats teacher",  # what the KL term holds the policy to
    "update",
]


@pytest.fixture(params=["a card", "no card"])
def card(request: pytest.FixtureRequest) -> Card | None:
    return Card(80 * GIB) if request.param == "a card" else None


def test_a_step_takes_one_handoff_with_and_without_memory_to_move(card: Card | None) -> None:
    trainer, events, _, _ = colocated(card)
    timer = PhaseTimer()
    trainer.step(1, timer)
    watched = ("teacher", "offload", "wake", "receive", "sample", "sleep", "onload", "update", "stats")
    assert [event for event in events if event.split()[0] in watched] == ORDER
    assert "time/switch_s" in timer.metrics()


def test_weights_that_were_lost_in_sleep_are_synced_again() -> None:
    actors = CardActors([], Card(80 * GIB))
    engines = CardEngines(actors.events, actors.card)
    colocation = Colocation(actors, engines)
    sync = make_sync(actors, engines, wake_caches=colocation.wake_caches)
    rollout_engines, timer = RolloutEngines(engines, sync, colocation=colocation), PhaseTimer()
    for _ in range(2):  # twice the same version, as in a validation and the step after it
        rollout_engines.run(lambda: rollout_engines.sync_weights("policy", 0, timer), timer)
    assert actors.events.count("receive 0") == 2


def test_the_actors_are_whole_after_a_handoff_that_failed() -> None:
    _, _, actors, colocation = colocated(Card(80 * GIB))
    with pytest.raises(ZeroDivisionError), colocation(PhaseTimer()):
        _ = 1 / 0
    assert actors.whole


def test_a_handoff_in_which_an_engine_died_is_repeated() -> None:
    """The engine's death shows once more when it shall sleep; the one in its place is awake from its start."""
    card = Card(80 * GIB)
    _, events, actors, colocation = colocated(card)
    engines: Any = colocation._engines
    asleep = engines.sleep

    def dead() -> Any:
        asleep()
        raise RunError("engine 0 has died")

    engines.sleep = dead
    with pytest.raises(RunError, match="has died"), colocation(PhaseTimer()):
        raise RunError("engine 0 has died while sampling")
    assert not actors.whole
    engines.sleep = asleep
    engines.start_again()
    with colocation(PhaseTimer()):
        pass
    assert actors.whole
    assert events.count("offload") == 2
    assert card.held["state of the actor"] == actors.state
    with (
        pytest.raises(RunError, match="the engines left 50.0 GiB .* the actors need 60.0 GiB"),
        colocation(PhaseTimer()),
    ):
        card.change("a leak", 20 * GIB)  # what the actors need is known, though they gave nothing the second time


def test_an_error_within_a_handoff_is_the_one_that_is_raised() -> None:
    _, _, _, colocation = colocated(None)
    engines: Any = colocation._engines

    def unable() -> Any:
        raise RunError("cannot sleep")

    engines.sleep = unable
    with pytest.raises(ZeroDivisionError) as caught, colocation(PhaseTimer()):
        _ = 1 / 0
    assert caught.value.__notes__ == ["after that: cannot sleep"]


def test_a_request_to_stop_does_not_wait_for_rollouts_that_nobody_will_use(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(80 * GIB)
    _, events, actors, colocation = colocated(card)
    engines: Any = colocation._engines

    def a_moment(seconds: float) -> None:  # after which the engine's process is gone
        events.append("wait")
        card.change("weights of the engine", 0)

    monkeypatch.setattr(time, "sleep", a_moment)
    engines.wake = lambda part: card.change("weights of the engine", 40 * GIB)
    with pytest.raises(Preempted), colocation(PhaseTimer()):
        raise Preempted("SIGTERM")
    assert [e for e in events if e in ("kill", "wait", "onload", "sleep")] == ["kill", "wait", "onload"]
    assert actors.whole


def test_engines_that_do_not_fit_beside_the_actors_weights_are_reported() -> None:
    trainer, events, _, colocation = colocated(Card(90 * GIB))
    colocation._engines_need = 85 * GIB
    with pytest.raises(RunError, match=r"the actors left 80.0 GiB .* the engines need 85.0 GiB.*gpu_memory_utiliz"):
        trainer.step(1, PhaseTimer())
    assert "wake weights" not in events


def test_actors_that_do_not_get_their_memory_back_are_reported() -> None:
    card = Card(80 * GIB)
    _, events, _, colocation = colocated(card)
    with (
        pytest.raises(RunError, match="the engines left 50.0 GiB .* the actors need 60.0 GiB"),
        colocation(PhaseTimer()),
    ):
        card.change("a leak", 20 * GIB)
    assert "onload" not in events


def test_engines_with_gpus_of_their_own_change_nothing() -> None:
    trainer, events, _, _ = make_trainer("co_rewarding_ii")
    trainer.step(1, PhaseTimer())
    assert not {"offload", "wake weights", "sleep", "onload"} & set(events)
