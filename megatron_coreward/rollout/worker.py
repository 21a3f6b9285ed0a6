"""A rollout engine in a process of its own: the shell that the driver makes a Ray actor of."""

import os
from typing import Any

from megatron_coreward.rollout.engine import RolloutEngine
from megatron_coreward.rollout.requests import Taken
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog

TAKING = "taking"  # the concurrency group of `take`: it may wait while another method runs


class RolloutWorker(LoggedWorker):
    """`ray.remote(RolloutWorker)`: carries out the methods of `RolloutEngine`, with arguments and results by value.

    If a process of the engine dies, this one does too: the driver notices it, and may start the engine again.
    """

    UNWATCHED = frozenset({"take"})  # it waits until something has ended

    def __init__(self, setup: EngineSetup, log: ProcessLog | None = None) -> None:
        super().__init__(log)
        with self._watching():
            self._engine = RolloutEngine(setup, on_worker_death=lambda: os._exit(1))

    def ready(self) -> bool:
        """True; a call that returns once the engine has started."""
        return True

    def run(self, method: str, *arguments: Any) -> Any:
        """A method of the engine. A call that fails because a process of the engine has died ends this process: it is
        not the request that is wrong."""
        return self._carry_out(method, *arguments)

    def take(self, engine: int, patience_s: float) -> Taken:
        """What has ended of the groups that are streamed (`RolloutEngine.take`), beside whatever else runs."""
        taken: Taken = self._carry_out("take", engine, patience_s)
        return taken

    def shutdown(self) -> None:
        self._engine.shutdown()

    def _carry_out(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._engine, method)(*arguments)
        except Exception:
            if self._engine.lost_a_process:
                os._exit(1)
            raise
