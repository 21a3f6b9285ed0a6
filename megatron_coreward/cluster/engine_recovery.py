"""An engine that dies is started anew, and what was asked of the engines is asked again."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from megatron_coreward.cluster.watchdog import WorkerDied
from megatron_coreward.cluster.weight_sync import WeightSync

T = TypeVar("T")


class RestartableEngines(Protocol):
    def restart(self, index: int) -> None: ...


class EngineRecovery:
    """Runs what needs the engines. Rollouts are functions of weights and seeds, so what is repeated is the same."""

    def __init__(
        self, engines: RestartableEngines, sync: WeightSync, max_restarts: int, notify: Callable[[str], None]
    ) -> None:
        """Args:
        max_restarts: engines that may be started anew in a run; the next death ends it.
        """
        self._engines, self._sync, self._left, self._notify = engines, sync, max_restarts, notify

    def __call__(self, ask: Callable[[], T]) -> T:
        """`ask()`, which syncs weights and then samples, and once more for every engine that dies in it, or in its
        new start.

        Raises WorkerDied for an actor rank, and for an engine when no restart is left.
        """
        dead: int | None = None
        while True:
            try:
                if dead is not None:
                    self._engines.restart(dead)
                    self._sync.reset()
                    dead = None
                return ask()
            except WorkerDied as death:
                if death.kind != "engine" or self._left == 0:
                    raise
                self._left -= 1
                self._notify(f"{death}; starting it anew ({self._left} restarts left, faults.engine_restarts)")
                dead = death.index
