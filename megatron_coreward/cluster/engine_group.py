"""The rollout engines, as one object: sampling is cut over them here. What all do alike is asked with `call`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_start import worker_options
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.cluster.worker_group import Command, Outstanding, WorkerGroup
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.types import Completion


class EngineGroup(WorkerGroup):
    """All rollout engines, built alike. Each is a part of its own."""

    def __init__(
        self, setup: EngineSetup, num_engines: int, placement: ReservedPlacement, watchdog: Watchdog | None = None
    ) -> None:
        """Starts the processes in the room that is reserved for them; `wait` returns once the engines are up."""
        super().__init__("engine", watchdog or Watchdog())
        self._setup, self._placement = setup, placement
        self.part_of = range(num_engines)
        for i in range(num_engines):
            self.add(self._start(i), i)
        self._started = [engine.ready.remote() for engine in self.workers]
        self.sampling_seconds: list[float] = []  # of each engine, of the last samples; emptied when it is taken

    def _start(self, index: int) -> Any:
        options = worker_options(
            self._placement.for_engine(index), self._setup.cpu_threads, self._placement.variables_for_engine(index)
        )
        return ray.remote(RolloutWorker).options(**options).remote(self._setup, self.watchdog.log_of(self.kind, index))

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
        begin = time.perf_counter()
        calls = [
            engine.run.remote("sample", list(requests[i::n]), expected_version) for i, engine in enumerate(self.workers)
        ]
        outstanding = Outstanding(Command("sample"), calls, self.watchdog)

        def finish() -> list[list[Completion]]:
            seconds = [0.0] * n

            def done(engine: int) -> None:
                seconds[engine] = time.perf_counter() - begin

            completions: list[list[Completion]] = [[] for _ in requests]
            for i, part in enumerate(outstanding.results(awaited="rollouts", interruptible=True, on_result=done)):
                completions[i::n] = part
            self.sampling_seconds = seconds
            return completions

        return finish

    def take_sampling_metrics(self) -> dict[str, float]:
        """How long the slowest and the fastest engine sampled since this was asked last; empty: not at all."""
        seconds, self.sampling_seconds = self.sampling_seconds, []
        if not seconds:
            return {}
        return {"rollout/slowest_engine_s": max(seconds), "rollout/fastest_engine_s": min(seconds)}

    def receive_weights(self, spec: dict[str, Any], version: int) -> Outstanding:
        """Lets every engine receive what the actors send; each is given its number."""
        calls = [engine.run.remote("receive_weights", spec, i, version) for i, engine in enumerate(self.workers)]
        return Outstanding(Command("receive_weights"), calls, self.watchdog)
