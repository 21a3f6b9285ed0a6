"""A rollout engine in a process of its own: the shell that the driver makes a Ray actor of."""

import os
from typing import Any

from megatron_coreward.rollout.engine import RolloutEngine
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog


class RolloutWorker(LoggedWorker):
    """`ray.remote(RolloutWorker)`: carries out the methods of `RolloutEngine`, with arguments and results by value.

    If a process of the engine dies, this one does too: the driver notices it, and may start the engine again.
    """

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
        try:
            return getattr(self._engine, method)(*arguments)
        except Exception:
            if self._engine.lost_a_process:
                os._exit(1)
            raise

    def shutdown(self) -> None:
        self._engine.shutdown()
