"""Engines that draw one token a tick, die when they are told to, and write down what was asked of them."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.rollout.requests import Fed, GroupName, Taken
from megatron_coreward.types import Completion, Completions, IntArray, WeightVersion
from tests.trainer.fakes import FakeEngines

Key = tuple[GroupName, int]


def length_of(key: Key) -> int:
    """Of a sample: most are short, some are ten times as long."""
    (step, role, place), sample = key
    number = 7 * step + 3 * place + 5 * sample + len(role)
    return 20 + number % 20 if number % 4 == 0 else 1 + number % 4


@dataclass
class Engine:
    """One engine: what it has, and whether it may draw."""

    held: int | None = None  # version of the weights
    drawing: int | None = None  # that `go_on` named
    active: dict[Key, list[int]] = field(default_factory=dict)  # the version of each token
    ended: list[tuple[Key, list[int]]] = field(default_factory=list)
    alive: bool = True


@dataclass(frozen=True, eq=False)
class Call:
    engine: Engine
    place: int
    takes: bool


class StreamingFakes(FakeEngines):
    """Several engines behind both contracts: that of weight syncs and that of streams."""

    def __init__(self, events: list[str], num: int = 2, first: int = 0) -> None:
        super().__init__(events)
        self.numbers = range(first, first + num)
        self.engines = [Engine() for _ in self.numbers]
        self.lock = threading.RLock()
        self.fed: list[GroupName] = []  # each time that samples of a group were fed
        self.drawn = Counter[Key]()  # how often a sample has ended
        self.most = [0] * num  # samples that an engine had at once
        self.on_ended: Callable[[], None] = lambda: None
        self.paused = False
        self.held_step: int | None = None  # of which nothing is drawn

    # Weights

    def receive_weights(self, spec: dict[str, Any], version: int, canary: IntArray | None) -> Any:
        with self.lock:
            for engine in self.engines:
                engine.held = engine.drawing = None
            for number, engine in zip(self.numbers, self.engines, strict=True):
                if not engine.alive:
                    raise WorkerDied("engine", number, "weights", ConnectionError("gone"))
                engine.held = version
        return super().receive_weights(spec, version, canary)

    def restart(self, index: int) -> None:
        super().restart(index)
        with self.lock:
            self.engines[self.numbers.index(index)] = Engine()

    def sleep(self) -> None:
        """As engines do that share their GPUs: they lose their weights, and keep what had begun."""
        with self.lock:
            for engine in self.engines:
                engine.held = engine.drawing = None

    def kill(self, place: int) -> None:
        with self.lock:
            self.engines[place].alive = False

    # Streams

    def feed(self, place: int, fed: Sequence[Fed]) -> Any:
        with self.lock:
            engine = self.engines[place]
            for one in fed:
                self.fed.append(one.name)
                engine.active |= {(one.name, sample): [] for sample in one.samples}
            self.most[place] = max(self.most[place], len(engine.active))
            return Call(engine, place, False)

    def abort(self, place: int, names: Sequence[GroupName]) -> Any:
        with self.lock:
            engine = self.engines[place]
            self.events.append(f"abort {names[0].place}")
            engine.active = {key: tokens for key, tokens in engine.active.items() if key[0] not in names}
            return Call(engine, place, False)

    def go_on(self, place: int, version: int) -> Any:
        with self.lock:
            engine = self.engines[place]
            assert engine.held == version or not engine.alive
            engine.drawing = version
            return Call(engine, place, False)

    def take(self, place: int, patience_s: float) -> Any:
        return Call(self.engines[place], place, True)

    def ready(self, calls: Sequence[Any], patience_s: float) -> list[Any]:
        time.sleep(0.0002)
        with self.lock:
            for engine in self.engines:
                self._tick(engine)
            return [call for call in calls if not (call.takes and call.engine.alive and not call.engine.ended)]

    def result(self, call: Any) -> Taken | None:
        with self.lock:
            if not call.engine.alive:
                raise WorkerDied("engine", self.numbers[call.place], "rollouts", ConnectionError("gone"))
            if not call.takes:
                return None
            ended, call.engine.ended = call.engine.ended, []
        completions = Completions([[completion_of(key, versions) for key, versions in ended]])
        return Taken(tuple(key for key, _ in ended), completions, (), ())

    def _tick(self, engine: Engine) -> None:
        if engine.drawing is None or not engine.alive or self.paused:
            return
        role = WeightVersion.of(engine.drawing).role
        for key in [key for key in engine.active if key[0].role == role and key[0].step != self.held_step]:
            engine.active[key].append(engine.drawing)
            if len(engine.active[key]) == length_of(key):
                engine.ended.append((key, engine.active.pop(key)))
                self.drawn[key] += 1
                self.on_ended()


def completion_of(key: Key, versions: list[int]) -> Completion:
    changes = [i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
    ids = np.arange(1, len(versions) + 1, dtype=np.int32)
    return Completion(
        ids,
        np.full(len(ids), -1.0, dtype=np.float32),
        f"so \\boxed{{{key[1] % 3}}}",
        str(key[1] % 3),
        "stop",
        versions[0],
        tuple((i, versions[i]) for i in changes),
    )
