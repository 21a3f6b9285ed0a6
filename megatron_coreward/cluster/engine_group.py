"""The rollout engines, all of them or some, as one object: sampling is cut over them here."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_start import worker_options
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.cluster.worker_group import Command, Outstanding, WorkerGroup
from megatron_coreward.rollout.requests import Fed, GroupName, SamplingRequest, Taken
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import TAKING, RolloutWorker
from megatron_coreward.types import Completion, EngineInterval


class EngineSet(WorkerGroup):
    """Some engines, built alike, that hold the same weights. Each is a part of its own."""

    numbers: range  # of these engines among all

    def __init__(self, watchdog: Watchdog, numbers: range) -> None:
        super().__init__("engine", watchdog)
        self.numbers = self.part_of = numbers
        self.sampling_seconds: list[float] = []  # of each engine, of the last samples; emptied when it is taken
        self._intervals: list[EngineInterval] = []

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        """Completions of all requests, in their order."""
        return self.begin_sampling(requests, expected_version)()

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]:
        """Lets the engines begin; the result waits for the completions. Engine i takes requests i, i + n, i + 2n ...

        The division is fixed: if requests went to whichever engine is free, the sizes of an engine's batches, and with
        them the rounding of its matrix products, would depend on timing, and no run could be repeated bit by bit.
        `sampling_seconds` shows a slow engine.
        """
        n = len(self.workers)
        begin, clock = time.time(), time.perf_counter()
        calls = [
            engine.run.remote("sample", list(requests[i::n]), expected_version) for i, engine in enumerate(self.workers)
        ]
        outstanding = Outstanding(Command("sample"), calls, self.watchdog)

        def finish() -> list[list[Completion]]:
            seconds = [0.0] * n

            def done(engine: int) -> None:
                seconds[engine] = time.perf_counter() - clock

            completions: list[list[Completion]] = [[] for _ in requests]
            for i, part in enumerate(outstanding.results(awaited="rollouts", interruptible=True, on_result=done)):
                completions[i::n] = part
            self.sampling_seconds = seconds
            self._intervals += [
                EngineInterval(number, "sample", expected_version, begin, begin + took)
                for number, took in zip(self.numbers, seconds, strict=True)
                if took
            ]
            return completions

        return finish

    def take_sampling_metrics(self) -> dict[str, float]:
        """How long the slowest and the fastest engine sampled since this was asked last; empty: not at all."""
        seconds, self.sampling_seconds = self.sampling_seconds, []
        if not seconds:
            return {}
        return {"rollout/slowest_engine_s": max(seconds), "rollout/fastest_engine_s": min(seconds)}

    def take_intervals(self) -> list[EngineInterval]:
        """When each engine sampled what `begin_sampling` gave it, since this was asked last."""
        intervals, self._intervals = self._intervals, []
        return intervals

    def receive_weights(self, spec: dict[str, Any], version: int) -> Outstanding:
        """Lets every engine receive what the actors send; each is given its number."""
        calls = [engine.run.remote("receive_weights", spec, i, version) for i, engine in enumerate(self.workers)]
        return Outstanding(Command("receive_weights"), calls, self.watchdog)

    # What `cluster.group_stream` asks of one engine, by its place in the set. All of it returns at once.

    def feed(self, place: int, fed: Sequence[Fed]) -> Any:
        """Gives an engine samples to draw (`RolloutEngine.feed`)."""
        return self.workers[place].run.remote("feed", list(fed))

    def abort(self, place: int, names: Sequence[GroupName]) -> Any:
        """Ends groups of an engine (`RolloutEngine.abort`)."""
        return self.workers[place].run.remote("abort", list(names))

    def go_on(self, place: int, version: int) -> Any:
        """Lets an engine draw from its weights (`RolloutEngine.go_on`)."""
        return self.workers[place].run.remote("go_on", version)

    def take(self, place: int, patience_s: float) -> Any:
        """Asks an engine for the samples that end next (`RolloutEngine.take`)."""
        take = self.workers[place].take.options(concurrency_group=TAKING)
        return take.remote(self.numbers[place], patience_s)

    def ready(self, calls: Sequence[Any], patience_s: float) -> list[Any]:
        """Those of the calls that are done; waits for one, `patience_s` at most."""
        done, pending = ray.wait(list(calls), num_returns=1, timeout=patience_s)
        if done and pending:
            done += ray.wait(pending, num_returns=len(pending), timeout=0)[0]
        return list(done)

    def result(self, call: Any) -> Taken | None:
        """Of a call that is done. Raises what `Watchdog.get` raises."""
        taken: Taken | None = self.watchdog.get([call], "rollouts")[0]
        return taken


class EngineGroup(EngineSet):
    """All rollout engines of a run."""

    def __init__(
        self, setup: EngineSetup, num_engines: int, placement: ReservedPlacement, watchdog: Watchdog | None = None
    ) -> None:
        """Starts the processes in the room that is reserved for them; `wait` returns once the engines are up."""
        super().__init__(watchdog or Watchdog(), range(num_engines))
        self._setup, self._placement = setup, placement
        for i in range(num_engines):
            self.add(self._start(i), i)
        self._started = [engine.ready.remote() for engine in self.workers]

    def _start(self, index: int) -> Any:
        options = worker_options(
            self._placement.for_engine(index), self._setup.cpu_threads, self._placement.variables_for_engine(index)
        )
        worker = ray.remote(concurrency_groups={TAKING: 1})(RolloutWorker)
        return worker.options(**options).remote(self._setup, self.watchdog.log_of(self.kind, index))

    def part(self, numbers: range) -> EngineSet:
        """Some of the engines, which hold weights of their own."""
        return _EnginePart(self, numbers)

    def wait(self) -> None:
        """Returns once all engines are up."""
        limit = self.watchdog.settings.start_limit_s
        self.watchdog.get(self._started, "its start", limit_s=limit, interruptible=True)

    def restart(self, index: int) -> None:
        """Puts a new engine, without weights, in the place of one that died."""
        ray.kill(self.workers[index])
        self.add(self._start(index), index)
        self._started = [self.workers[index].ready.remote()]
        self.wait()


class _EnginePart(EngineSet):
    """A view: an engine that is started again is seen here."""

    def __init__(self, group: EngineGroup, numbers: range) -> None:
        self._group = group
        super().__init__(group.watchdog, numbers)

    @property
    def workers(self) -> list[Any]:
        return self._group.workers[self.numbers.start : self.numbers.stop]

    @workers.setter
    def workers(self, workers: list[Any]) -> None:
        """The group's are seen."""
