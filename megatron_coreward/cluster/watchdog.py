"""Waiting for workers: says for what, on which of them and for how long, and ends a wait that has become a stall.

Every result of a worker passes here. A worker that died is one clear error that names it, even when others report first
that their peer has gone.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from megatron_coreward.cluster.memory_kill import memory_kill
from megatron_coreward.cluster.preemption import StopRequest
from megatron_coreward.config.schema import WatchdogSettings
from megatron_coreward.errors import RunError, environment_problem
from megatron_coreward.telemetry.process_log import ProcessLog

Kind = Literal["actor rank", "engine", "worker"]

LOOK_EVERY_S = 0.5  # how soon a request to stop is seen
GATHER_S = 0.02  # for more results, once one has come
PEERS_S = 5.0  # a peer's death may be known a little later than the error that it caused elsewhere
STACKS_AT = 0.9  # of the limit of a wait, a worker writes its stacks: it is ended when the limit has passed
LESS_MEMORY = (
    "(less: actor.tokens_per_microbatch, rollout.gpu_memory_utilization; more: actor.recompute, "
    "actor.offload_optimizer, or another layout: `megatron-coreward plan` shows the bytes)"
)
_DEATHS = (
    RayActorError,
    ActorDiedError,
    ActorUnavailableError,
    WorkerCrashedError,
    OutOfMemoryError,
    NodeDiedError,
    ObjectLostError,  # the node that kept a worker's result is gone
)


class WorkerDied(RunError):
    """A process of the run is gone, or could not start."""

    def __init__(self, kind: Kind, index: int, awaited: str, cause: Exception, output: object = "Ray's logs") -> None:
        """Args:
        output: where what it printed is found.
        """
        lines = str(cause).strip().splitlines() or ["no reason given"]
        in_its_start = [number for number, line in enumerate(lines) if re.match(r'  File ".*, in ', line)]
        killed = memory_kill(str(cause))
        if killed is not None:
            what = f"{killed}; this was during {awaited}"
        elif in_its_start:  # Ray gives the error of a constructor as the text of its traceback
            error = dropwhile(lambda line: line.startswith("  "), lines[in_its_start[-1] :])
            what = f"could not start: {' '.join(line.strip() for line in error)}"
        else:
            what = f"died during {awaited} ({type(cause).__name__}: {lines[0]})"
        super().__init__(f"{kind} {index} {what}; what it printed is in {output}")
        self.kind, self.index = kind, index


class Watchdog:
    """Waits for results of workers that it knows by name."""

    def __init__(
        self,
        settings: WatchdogSettings | None = None,
        notify: Callable[[str], None] = lambda text: None,
        stop: StopRequest | None = None,
        clock: Callable[[], float] = time.monotonic,
        logs: Path | None = None,
    ) -> None:
        """Args:
        notify: takes a line for people about a wait that is long.
        stop: ends an interruptible wait.
        logs: a folder for the output of the workers; None: it stays in Ray's logs.
        """
        self.settings = settings or WatchdogSettings()
        self.notify = notify
        self._stop = stop
        self._clock = clock
        self._logs = logs
        self._names: dict[Any, tuple[Kind, int]] = {}  # of Ray actors, by id
        self._behind: dict[Any, Callable[[], Sequence[int]]] = {}  # of Ray actors that stand for others
        self._lives: list[Any] = []  # calls that only the end of a worker ends
        self._ended: list[Any] = []  # of them

    def name(self, worker: Any, kind: Kind, index: int, behind: Callable[[], Sequence[int]] | None = None) -> None:
        """Makes a worker known.

        Args:
            behind: if the worker stands for several: those of them that are still at the work that is awaited.
        """
        self._names[worker._actor_id] = (kind, index)
        if behind is not None:
            self._behind[worker._actor_id] = behind

    def watch_life(self, call: Any) -> None:
        """Takes a call that only the end of its worker ends: from then on every wait ends with it."""
        self._lives.append(call)
        call.future().add_done_callback(lambda _: self._ended.append(call))

    def log_of(self, kind: Kind, index: int) -> ProcessLog | None:
        """What a worker should do with its output."""
        if self._logs is None:
            return None
        path = self._logs.resolve() / f"{kind.replace(' ', '_')}_{index}.log"
        return ProcessLog(path, STACKS_AT * self.settings.limit_s)

    def get(
        self,
        calls: Sequence[Any],
        awaited: str,
        *,
        limit_s: float | None = None,
        interruptible: bool = False,
        on_result: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """The results of calls, in their order.

        Args:
            awaited: what it is, for messages.
            limit_s: seconds after which the wait is a stall; None: `watchdog.limit_s`.
            interruptible: whether a request to stop the run ends the wait (the workers go on with it).
            on_result: hears the place of each call whose result has come.

        Raises:
            WorkerDied: a worker is gone.
            RunError: the limit has passed; a worker met an error of the machine or of the numbers.
            Preempted: the run was asked to stop.
        """
        patience = self._patience(awaited, limit_s)
        places = {call: place for place, call in enumerate(calls)}
        results: list[Any] = [None] * len(calls)
        pending = list(calls)
        while pending:
            if interruptible and self._stop is not None:
                self._stop.check()
            ready, pending = ray.wait(pending, num_returns=1, timeout=LOOK_EVERY_S)
            if ready and pending:  # whatever comes soon: one look at thousands of calls for each would cost seconds
                more, pending = ray.wait(pending, num_returns=len(pending), timeout=GATHER_S)
                ready = ready + more
            for call, result in zip(ready, self._results(ready, pending, awaited), strict=True):
                results[places[call]] = result
                if on_result is not None:
                    on_result(places[call])
            if pending:
                patience(partial(self._who, pending))
        return results

    def until(self, ready: Callable[[], bool], awaited: str, engines: Callable[[], Sequence[int]]) -> None:
        """Waits for something that engines bring about, and that is no result of a call.

        Args:
            ready: whether it is there; waits for it, `LOOK_EVERY_S` at most.
            awaited: what it is, for messages.
            engines: the numbers of those that are awaited, for messages.

        Raises what `get` does; a request to stop ends the wait.
        """
        patience = self._patience(awaited, None)
        while not ready():
            if self._stop is not None:
                self._stop.check()
            for call in self._ended:
                self._result(call, self._lives, awaited)
            patience(lambda: ", ".join(f"engine {number}" for number in engines()))

    def _patience(self, awaited: str, limit_s: float | None) -> Callable[[Callable[[], str]], None]:
        """Begins a wait; the result is called as long as it lasts, with a function that names those who are awaited."""
        begin = self._clock()
        limit = self.settings.limit_s if limit_s is None else limit_s
        warn_at = min(self.settings.warn_after_s, limit)

        def check(who: Callable[[], str]) -> None:
            nonlocal warn_at
            waited = self._clock() - begin
            if waited >= limit:
                raise RunError(
                    f"stalled: waited for {awaited} from {who()} for {waited:.0f} s "
                    f"(limit: {limit:.0f} s, watchdog.{'limit_s' if limit_s is None else 'start_limit_s'})"
                )
            if waited >= warn_at:
                self.notify(f"still waiting for {awaited} from {who()} after {waited:.0f} s")
                warn_at = waited + self.settings.warn_after_s

        return check

    def _who(self, calls: Sequence[Any]) -> str:
        names: set[tuple[Kind, int]] = set()
        for call in calls:
            kind, index = self._name_of(call)
            behind = self._behind.get(call.task_id().actor_id())
            names.update((kind, i) for i in (behind() if behind is not None else ()) or (index,))
        return ", ".join(f"{kind} {index}" for kind, index in sorted(names))

    def _name_of(self, call: Any) -> tuple[Kind, int]:
        return self._names.get(call.task_id().actor_id(), ("worker", 0))

    def _results(self, ready: list[Any], pending: Sequence[Any], awaited: str) -> list[Any]:
        """Of calls that have ended. Fetched at once: one by one, thousands cost several times as much."""
        if not self._ended:
            try:
                return list(ray.get(ready))
            except Exception:  # one call has failed: the loop below fetches each and says which
                pass
        others = [*ready, *pending, *self._lives]
        for call in self._ended:
            self._result(call, others, awaited)  # of a worker that was not asked to leave: an error
        return [self._result(call, others, awaited) for call in ready]

    def _result(self, call: Any, others: Sequence[Any], awaited: str) -> Any:
        try:
            return ray.get(call)
        except _DEATHS as error:
            raise self._death(call, awaited, error) from error
        except RayTaskError as error:
            ready: list[Any] = ray.wait(list(others), num_returns=len(others), timeout=PEERS_S)[0]
            for other in ready:
                try:
                    ray.get(other)
                except _DEATHS as death:
                    raise self._death(other, awaited, death) from error
                except Exception:  # an error of its own, as when a partner fails: the first one is raised below
                    continue
            cause = getattr(error, "cause", None)
            if isinstance(cause, OSError):
                raise RunError(f"{awaited}: {self._who([call])}: {environment_problem(cause)}") from error
            if isinstance(cause, FloatingPointError) or type(cause) is RunError:
                raise RunError(f"{awaited}: {self._who([call])}: {cause}") from error
            if isinstance(cause, torch.OutOfMemoryError):
                raise RunError(f"{awaited}: {self._who([call])}: {cause} {LESS_MEMORY}") from error
            raise

    def _death(self, call: Any, awaited: str, error: Exception) -> WorkerDied:
        name = self._name_of(call)
        log = self.log_of(*name)
        return WorkerDied(*name, awaited, error, log.path if log is not None else "Ray's logs")
