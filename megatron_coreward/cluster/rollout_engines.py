"""The engines of a run as the trainer asks them: awake, with the weights that are asked for, replaced when one dies.

Rollouts are functions of weights and seeds, so what is asked again after a death is answered the same.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from megatron_coreward.cluster.colocation import Colocation, GpuHandoff, no_handoff
from megatron_coreward.cluster.processes import Processes
from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.cluster.weight_sync import ReceivingEngines, SyncReport, WeightSync, open_sync
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import Completion, IntArray, Role, WeightVersion

T = TypeVar("T")


class Engines(ReceivingEngines, Protocol):
    """What is needed of the engines (`cluster.engine_group.EngineGroup`)."""

    def restart(self, index: int) -> None: ...
    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]: ...
    def take_sampling_metrics(self) -> dict[str, float]: ...


class RolloutEngines:
    """Engines, the weight sync that serves them, and the GPUs that they may share with the actors."""

    def __init__(
        self,
        engines: Engines,
        sync: WeightSync,
        *,
        colocation: Colocation | None = None,
        max_restarts: int = 0,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Args:
        colocation: that the sync was opened with; None: the engines have GPUs of their own.
        max_restarts: engines that may be started again in a run; the next death ends it.
        """
        self._engines, self.sync = engines, sync
        self._handoff: GpuHandoff = colocation or no_handoff
        self._colocated = colocation is not None
        self._restarts_left, self._notify = max_restarts, notify
        self._reports: list[SyncReport] = []

    def run(self, ask: Callable[[], T], timer: PhaseTimer) -> T:
        """`ask()`, which syncs weights and samples, and once more for every engine that dies in it, or in its restart.

        Raises WorkerDied for an actor rank, and for an engine if no restart is left.
        """
        dead: int | None = None
        while True:
            try:
                if dead is not None:
                    self._engines.restart(dead)
                    self.sync.reset()
                    dead = None
                if self._colocated:
                    self.sync.invalidate()  # the engines have lost their weights when they were put to sleep
                with self._handoff(timer):
                    return ask()
            except WorkerDied as death:
                if death.kind != "engine" or self._restarts_left == 0:
                    raise
                self._restarts_left -= 1
                self._notify(
                    f"{death}; starting it again ({self._restarts_left} restarts left, faults.engine_restarts)"
                )
                dead = death.index

    def sync_weights(self, role: Role, num_updates: int, timer: PhaseTimer) -> int:
        """Brings a role's present weights to the engines, unless they hold them already; returns their version."""
        with timer.phase("sync"):
            report = self.sync.sync_weights(role, num_updates)
        if report is not None:
            self._reports.append(report)
        return WeightVersion(role, num_updates).number

    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]:
        """Lets the engines begin; the result waits for the completions of all requests, in their order."""
        return self._engines.begin_sampling(requests, expected_version)

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        """Completions of all requests, in their order."""
        return self.begin_sampling(requests, expected_version)()

    @property
    def epoch(self) -> int:
        """Grows when an engine is started again: rollouts that were in flight before are lost."""
        return self.sync.engine_epoch

    def take_syncs(self) -> list[SyncReport]:
        """The weight syncs since this was asked last."""
        reports, self._reports = self._reports, []
        return reports

    def take_sampling_metrics(self) -> dict[str, float]:
        """How long the slowest and the fastest engine sampled since this was asked last; empty: not at all."""
        return self._engines.take_sampling_metrics()


def open_rollout_engines(
    config: RunConfig, processes: Processes, canary: IntArray, notify: Callable[[str], None] = lambda text: None
) -> RolloutEngines:
    """The engines of a run, with the weight sync that it is configured for.

    Args:
        canary: tokens whose log-probs check every weight sync (`weight_sync.canary_tokens`).
    """
    sync = open_sync(config, processes, canary)
    if processes.colocation is not None:
        sync.open()  # buckets take memory on the GPU, which the first handoff has to know of
    return RolloutEngines(
        processes.engines,
        sync,
        colocation=processes.colocation,
        max_restarts=config.faults.engine_restarts,
        notify=notify,
    )
