"""One card, two lives: actors and engines that share their GPUs (`rollout.placement: colocated`).

While the engines sample, the actors are offloaded: they free the memory of what neither a weight sync nor its canary
needs; the engines wake with room for their weights; weights are synced; the engines allocate their key-value caches;
they sample; they sleep; the actors are onloaded. What each switch freed is measured and compared with what the next one
needs, so that a run that does not fit ends with a message, not in the middle of a kernel.

Without GPUs the calls come in the same order, and there is no memory to move.

Invariants (tests/cluster/test_colocation.py):
  1. Engines never hold memory while actors hold theirs, except for the weights that are being synced.
  2. After a handoff, whatever ended it, the actors are whole again, unless the engines keep their memory. The next
     handoff then begins with putting to sleep whoever is awake.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from megatron_coreward.cluster.preemption import Preempted
from megatron_coreward.cluster.worker_group import Workers
from megatron_coreward.errors import RunError
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.telemetry.timing import PhaseTimer

SWITCH = "switch"  # the phase of a step that the switches are timed as
PATIENCE_S, LOOK_EVERY_S = 30.0, 0.5  # with processes that were ended
Memories = Sequence[DeviceMemory | None]


class SleepableEngines(Workers, Protocol):
    """What colocation needs of the engines (`cluster.engine_group.EngineGroup`)."""

    def kill(self) -> None: ...


GpuHandoff = Callable[[PhaseTimer], AbstractContextManager[None]]


def no_handoff(timer: PhaseTimer) -> AbstractContextManager[None]:
    """For engines with GPUs of their own: they are always awake."""
    return nullcontext()


class Colocation:
    """Hands the GPUs of a run to the engines, and back to the actors."""

    def __init__(self, actors: Workers, engines: SleepableEngines, engines_slept: Memories = ()) -> None:
        """Args:
        engines_slept: what the engines freed when they were put to sleep, before the actors started.
        """
        self._actors, self._engines = actors, engines
        self._engines_need = _most_freed(engines_slept)
        self._actors_need = 0
        self._awake = False  # engines, or some of them
        self._caches_asleep = False

    @contextmanager
    def __call__(self, timer: PhaseTimer) -> Iterator[None]:
        """The engines have the GPUs within. They have lost their weights: a sync must come before they sample.

        Raises:
            RunError: less memory was freed than the other side needs.
        """
        with timer.phase(SWITCH):
            if self._awake:  # the handoff before has failed, and an engine that was started again since is awake
                self._put_to_sleep()
            self._offload()
            self._awake = True
            self._engines.call("wake", "weights")
            self._caches_asleep = True
        try:
            yield
        except Preempted:
            self._engines.kill()  # they would finish their rollouts first, and nobody waits for those
            self._onload_when_there_is_room()
            raise
        except Exception as error:
            try:
                self._end(timer)
            except Exception as another:
                error.add_note(f"after that: {another}")
            raise
        else:
            self._end(timer)

    def wake_caches(self) -> None:
        """The engines hold weights and allocate their key-value caches, if they have not done so."""
        if self._caches_asleep:
            self._engines.call("wake", "kv_cache")
            self._caches_asleep = False

    def _end(self, timer: PhaseTimer) -> None:
        with timer.phase(SWITCH):
            slept = self._put_to_sleep()
            _require(slept, self._actors_need, "the engines", "the actors", "actor.tokens_per_microbatch")
            self._actors.call("onload")

    def _offload(self) -> None:
        freed = self._actors.call("offload")
        self._actors_need = max(self._actors_need, _most_freed(freed))  # nothing if they were offloaded already
        _require(freed, self._engines_need, "the actors", "the engines", "rollout.gpu_memory_utilization")

    def _put_to_sleep(self) -> Memories:
        slept = self._engines.call("sleep")
        self._awake = False
        self._engines_need = max(self._engines_need, _most_freed(slept))
        return slept

    def _onload_when_there_is_room(self) -> None:
        """Once the processes of engines that were killed are gone, which takes them a moment."""
        for _ in range(int(PATIENCE_S / LOOK_EVERY_S)):
            free = _least_free(self._actors.call("offload"))
            if free is None or free >= self._actors_need:
                break
            time.sleep(LOOK_EVERY_S)
        self._actors.call("onload")


def _most_freed(memories: Memories) -> int:
    return max((memory.freed for memory in memories if memory is not None), default=0)


def _least_free(memories: Memories) -> int | None:
    return min((memory.free for memory in memories if memory is not None), default=None)


def _require(memories: Memories, needed: int, who: str, whom: str, key: str) -> None:
    free = _least_free(memories)
    if free is not None and free < needed:
        raise RunError(
            f"rollout.placement: colocated: {who} left {free / 2**30:.1f} GiB of a GPU, {whom} need "
            f"{needed / 2**30:.1f} GiB; choose a smaller {key}"
        )
