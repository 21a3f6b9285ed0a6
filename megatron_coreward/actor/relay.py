"""Commands on their way to the ranks: the driver calls one rank of each replica, its leader, which passes them on.

A replica is the ranks of one data-parallel rank: one copy of the model. Its leader is a rank that has results (last
pipeline stage, first tensor-parallel rank). Commands and answers travel over a process group of the replica, on CPU.
A rank that fails ends its loop with the error, so that the driver hears of it at once, whatever the others wait for.

Invariants (tests/actor/test_relay.py):
  1. Every rank of a replica carries out every command once, in the order in which the leader was given them.
  2. The answers of the ranks that are wanted come back, each under its rank.
  3. After an error from which a run can go on (`RECOVERABLE`), the ranks take the next command.
"""

import datetime
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout

# Commands that all ranks of a replica leave with an error if one does: those that others give up too.
RECOVERABLE = frozenset({"open_sender", "send_weights"})
PROGRESS = "progress"  # in the store of the ranks: how many commands each has carried out
_FOREVER = datetime.timedelta(days=3650)  # a rank waits for commands as long as the driver lives

Run = Callable[..., Any]  # (method, *arguments) -> result


@dataclass(frozen=True, slots=True)
class _Command:
    """A command as it goes from the leader to the others."""

    method: str
    arguments: tuple[Any, ...]
    wanted: Collection[int] | None  # ranks whose results are wanted; None: all


@dataclass(frozen=True, slots=True)
class _Answer:
    rank: int
    result: Any
    error: RunError | None


def replica_of(layout: ActorLayout, dp_rank: int) -> list[int]:
    """The ranks of a replica, its leader first."""
    members = [rank for rank in range(layout.world_size) if layout.place(rank).dp == dp_rank]
    last = layout.pipeline_parallel - 1
    leader = next(r for r in members if layout.place(r).pp == last and layout.place(r).tp == 0)
    return [leader, *(rank for rank in members if rank != leader)]


def _without_frames(error: RunError) -> RunError:
    """The error, as it would arrive in another process: without the frames that it has passed, which hold memory."""
    passed: BaseException | None = error
    while passed is not None:
        passed.__traceback__ = None
        passed = passed.__cause__ or passed.__context__
    return error


class Relay:
    """One rank's end."""

    def __init__(self, layout: ActorLayout, rank: int, store: Any) -> None:
        """All ranks construct theirs together, when the default process group is there.

        Args:
            store: a client of the ranks' store, for `PROGRESS`.
        """
        self.leader, *others = replica_of(layout, layout.place(rank).dp)
        self._rank, self._num_members = rank, 1 + len(others)
        self._store, self._count = store, 0
        self._group: Any = None
        # Every rank makes the groups of all replicas: torch names a group that only its members make after how many
        # groups each has so far, and pipeline stages have different numbers (they would wait for each other for ever).
        for replica in range(layout.data_parallel if others else 0):
            members = sorted(replica_of(layout, replica))
            group = dist.new_group(members, timeout=_FOREVER, backend="gloo")
            if rank in members:
                self._group = group

    @property
    def leads(self) -> bool:
        return self._rank == self.leader

    def lead(self, method: str, arguments: tuple[Any, ...], wanted: Collection[int] | None, run: Run) -> dict[int, Any]:
        """On the leader: lets all ranks of the replica carry out a command. Returns the wanted results by rank.

        Args:
            wanted: ranks whose results are wanted; None: all.

        Raises:
            RunError: of the first rank that met an error from which a run can go on.
        """
        command = _Command(method, arguments, wanted)
        self._broadcast(command)
        mine = self._carry_out(command, run)
        # All answers travel in the size of the largest: the leader's own, which may be large, stays here.
        others = self._collect(replace(mine, result=None))
        answers = [mine if answer.rank == mine.rank else answer for answer in others]
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return {a.rank: a.result for a in answers if command.wanted is None or a.rank in command.wanted}

    def follow(self, run: Run) -> None:
        """On the others: carries out commands until the leader dismisses them. An error ends it."""
        while (command := self._broadcast(None)) is not None:
            self._collect(self._carry_out(command, run))

    def dismiss(self) -> None:
        """On the leader: lets the others leave `follow`."""
        self._broadcast(None)

    def _carry_out(self, command: _Command, run: Run) -> _Answer:
        result, failure = None, None
        try:
            result = run(command.method, *command.arguments)
        except RunError as error:
            if command.method not in RECOVERABLE:
                raise
            failure = _without_frames(error)
        self._count += 1
        self._store.set(f"{PROGRESS}/{self._rank}", str(self._count))
        wanted = command.wanted is None or self._rank in command.wanted
        return _Answer(self._rank, result if wanted else None, failure)

    def _broadcast(self, command: _Command | None) -> _Command | None:
        if self._group is None:
            return command
        passed: list[_Command | None] = [command]
        dist.broadcast_object_list(passed, src=self.leader, group=self._group)
        return passed[0]

    def _collect(self, answer: _Answer) -> list[_Answer]:
        if self._group is None:
            return [answer]
        answers: list[Any] | None = [None] * self._num_members if self.leads else None
        dist.gather_object(answer, answers, dst=self.leader, group=self._group)
        return answers or []
