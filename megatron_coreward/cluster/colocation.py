"""One card, two lives: actors and engines that share their GPUs take turns (`rollout.placement: colocated`).

A turn of the engines: the actors give away what neither publishing nor a probe needs; the engines take the memory of
their weights; weights are published; the engines take that of their key-value caches; they sample; they sleep; the
actors take their memory back. What each switch gave is measured and compared with what the next one needs, so that a
run that does not fit ends with a message, not in the middle of a kernel.

Without GPUs the calls come in the same order, and there is no memory to move.

Invariants (tests/cluster/test_colocation.py):
  1. Engines never hold memory while actors hold theirs, but for the weights that are being published.
  2. After a turn, whatever ended it, the actors are whole again, unless the engines keep their memory. The next turn
     then begins with putting to sleep whoever is awake.
  3. Weights that an engine has dropped are published anew before it samples.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from megatron_coreward.cluster.preemption import Preempted
from megatron_coreward.cluster.weight_sync import ReceivingEngines
from megatron_coreward.errors import RunError
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import FloatArray, IntArray

SWITCH = "switch"  # the phase of a step that the switches are timed as
PATIENCE_S, LOOK_EVERY_S = 30.0, 0.5  # with processes that were ended
Memories = Sequence[DeviceMemory | None]


class OffloadableActors(Protocol):
    """What taking turns needs of the actors (`cluster.groups.ActorGroup`)."""

    def offload(self) -> Memories: ...
    def onload(self) -> Memories: ...


class SleepableEngines(ReceivingEngines, Protocol):
    """What taking turns needs of the engines (`cluster.groups.EngineGroup`)."""

    def sleep(self) -> Memories: ...
    def wake(self, part: str) -> Memories: ...
    def abandon(self) -> None: ...


class SyncedWeights(Protocol):
    """What is thought to be in the engines (`cluster.weight_sync.WeightSync`)."""

    def invalidate(self) -> None: ...


GpuHandoff = Callable[[PhaseTimer], AbstractContextManager[None]]


def no_handoff(timer: PhaseTimer) -> AbstractContextManager[None]:
    """For engines with GPUs of their own: they are always awake."""
    return nullcontext()


class ColocatedEngines:
    """The engines, as publishing sees them: their caches come into memory when a turn's first weights are there."""

    def __init__(self, engines: SleepableEngines) -> None:
        self._engines = engines
        self.caches_asleep = False

    def receive_weights(self, spec: dict[str, Any], version: int) -> list[Any]:
        return self._engines.receive_weights(spec, version)

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        if self.caches_asleep:  # the canary of a weight sync is the first that needs them
            self._engines.wake("kv_cache")
            self.caches_asleep = False
        return self._engines.score(token_ids)


class Colocation:
    """Turns of the engines of a run, in which the actors stand back."""

    def __init__(self, actors: OffloadableActors, engines: SleepableEngines, engines_slept: Memories = ()) -> None:
        """Args:
        engines_slept: what the engines gave when they were put to sleep, before the actors started.
        """
        self._actors, self._engines = actors, engines
        self.engines = ColocatedEngines(engines)
        self.published: SyncedWeights | None = None  # the sync, which is made of `engines`
        self._engines_need = _most_given(engines_slept)
        self._actors_need = 0
        self._awake = False  # engines, or some of them

    @contextmanager
    def __call__(self, timer: PhaseTimer) -> Iterator[None]:
        """The engines' turn.

        Raises:
            RunError: less memory was given away than the other side needs.
        """
        with timer.phase(SWITCH):
            if self._awake:  # the turn before has failed, and an engine in the place of one that died is awake
                self._put_to_sleep()
            self._offload()
            self._awake = True
            self._engines.wake("weights")
            self.engines.caches_asleep = True
        try:
            yield
        except Preempted:
            self._engines.abandon()  # they would finish their rollouts first, and nobody waits for those
            self._take_room_back()
            raise
        except Exception as error:
            try:
                self._end(timer)
            except Exception as another:
                error.add_note(f"after that: {another}")
            raise
        else:
            self._end(timer)

    def _end(self, timer: PhaseTimer) -> None:
        with timer.phase(SWITCH):
            slept = self._put_to_sleep()
            _require(slept, self._actors_need, "the engines", "the actors", "actor.tokens_per_microbatch")
            self._actors.onload()

    def _offload(self) -> None:
        given = self._actors.offload()
        self._actors_need = max(self._actors_need, _most_given(given))  # nothing where they were away already
        _require(given, self._engines_need, "the actors", "the engines", "rollout.gpu_memory_utilization")

    def _put_to_sleep(self) -> Memories:
        slept = self._engines.sleep()
        self._awake = False
        if self.published is not None:
            self.published.invalidate()
        self._engines_need = max(self._engines_need, _most_given(slept))
        return slept

    def _take_room_back(self) -> None:
        """Once the processes of engines that were abandoned are gone, which takes them a moment."""
        for _ in range(int(PATIENCE_S / LOOK_EVERY_S)):
            free = _least_free(self._actors.offload())
            if free is None or free >= self._actors_need:
                break
            time.sleep(LOOK_EVERY_S)
        self._actors.onload()


def open_colocation(
    placement: str, actors: OffloadableActors, engines: SleepableEngines, engines_slept: Memories
) -> Colocation | None:
    """The turns of a run; None where engines have GPUs of their own."""
    return Colocation(actors, engines, engines_slept) if placement == "colocated" else None


def _most_given(memories: Memories) -> int:
    return max((memory.given for memory in memories if memory is not None), default=0)


def _least_free(memories: Memories) -> int | None:
    return min((memory.free for memory in memories if memory is not None), default=None)


def _require(memories: Memories, needed: int, who: str, whom: str, key: str) -> None:
    free = _least_free(memories)
    if free is not None and free < needed:
        raise RunError(
            f"rollout.placement: colocated: {who} left {free / 2**30:.1f} GiB of a GPU, {whom} need "
            f"{needed / 2**30:.1f} GiB; choose a smaller {key}"
        )
