"""One way to call the workers of a run: a command goes out, every worker carries it out, the wanted results come back.

A command is data: a method of `MegatronActor` or `RolloutEngine`, its arguments, and the workers whose results are
wanted. `WorkerGroup.dispatch` is the only place that knows how a command reaches the workers: here, one call to each.
Ranks are reached through the leader of their replica (`ActorGroup.dispatch`).

Calls that fail raise the worker's error, with its traceback, in the driver. Every wait goes through the watchdog, and
awaits all workers, wanted result or not: the death of any of them is noticed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from megatron_coreward.cluster.watchdog import Kind, Watchdog

PATIENCE_S = 20.0  # with workers that are asked to leave


@dataclass(frozen=True, slots=True)
class Command:
    """A call that all workers of a group carry out."""

    method: str
    arguments: tuple[Any, ...] = ()  # the same for every worker
    parts: tuple[tuple[Any, ...], ...] = ()  # arguments before them, one tuple for each part of the group
    results_of: tuple[int, ...] | None = None  # workers whose results are wanted; None: all


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A command that workers are carrying out."""

    command: Command
    calls: list[Any]  # for `ray.wait`: one for each worker, or one for all whom a leader stands for
    watchdog: Watchdog
    by_worker: bool = False  # each call brings results by the number of the worker, the wanted ones alone

    def results(
        self,
        *,
        awaited: str | None = None,
        limit_s: float | None = None,
        interruptible: bool = False,
        on_result: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Waits for all workers; the results of those that are wanted, in the order of the workers.

        Args:
            awaited: what it is, for messages; None: the method's name.

        The other arguments and the errors are those of `Watchdog.get`.
        """
        results = self.watchdog.get(
            self.calls,
            awaited or self.command.method,
            limit_s=limit_s,
            interruptible=interruptible,
            on_result=on_result,
        )
        wanted = self.command.results_of
        if self.by_worker:
            found = {worker: result for of_leader in results for worker, result in of_leader.items()}
            return [found[worker] for worker in (sorted(found) if wanted is None else wanted)]
        return results if wanted is None else [results[worker] for worker in wanted]


class Workers(Protocol):
    """Whoever carries out commands: an `ActorGroup` or an `EngineGroup`."""

    def call(self, method: str, *arguments: Any, results_of: tuple[int, ...] | None = None) -> list[Any]: ...
    def begin(self, method: str, *arguments: Any) -> Outstanding: ...


class WorkerGroup:
    """Workers of one kind, each a Ray actor with a method `run(method, *arguments)`."""

    def __init__(self, kind: Kind, watchdog: Watchdog) -> None:
        self.kind, self.watchdog = kind, watchdog
        self.workers: list[Any] = []
        self.part_of: Sequence[int] = ()  # the part of each worker: data-parallel rank of a rank, number of an engine

    def dispatch(self, command: Command) -> Outstanding:
        """Sends a command to every worker. Each part is serialised once, however many workers take it."""
        if not command.parts:
            calls = [worker.run.remote(command.method, *command.arguments) for worker in self.workers]
        else:
            sent = [tuple(ray.put(argument) for argument in part) for part in command.parts]
            calls = [
                worker.run.remote(command.method, *sent[part], *command.arguments)
                for worker, part in zip(self.workers, self.part_of, strict=True)
            ]
        return Outstanding(command, calls, self.watchdog)

    def begin(self, method: str, *arguments: Any) -> Outstanding:
        """Sends a command, and does not wait."""
        return self.dispatch(Command(method, arguments))

    def call(self, method: str, *arguments: Any, results_of: tuple[int, ...] | None = None) -> list[Any]:
        """The method on every worker with the same arguments; the results of the wanted workers, in their order."""
        return self.dispatch(Command(method, arguments, results_of=results_of)).results()

    def call_parts(
        self, method: str, parts: Sequence[tuple[Any, ...]], results_of: tuple[int, ...] | None = None
    ) -> list[Any]:
        """The method on every worker with the arguments of its part."""
        return self.dispatch(Command(method, parts=tuple(parts), results_of=results_of)).results()

    def add(self, worker: Any, index: int) -> None:
        """Takes a worker in, in the place of the one that had this number."""
        self.workers[index : index + 1] = [worker]
        self.watchdog.name(worker, self.kind, index)

    def kill(self) -> None:
        """Ends the workers at once, whatever they do."""
        for worker in self.workers:
            ray.kill(worker)

    def shutdown(self, patience_s: float = PATIENCE_S) -> None:
        """Asks the workers to leave and ends those that do not."""
        calls = [worker.shutdown.remote() for worker in self.workers]
        ray.wait(calls, num_returns=len(calls), timeout=patience_s)
        self.kill()
