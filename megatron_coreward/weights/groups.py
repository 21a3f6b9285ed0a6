"""Process groups of a weight sync: messages from point to point, over gloo or NCCL, behind the same calls.

The ranks of the actor come first, then the workers of all engines, engine by engine. The bytes that a process sends and
receives are counted here, where they leave and arrive.
"""

import datetime
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.meeting import LOOK_EVERY_S, Meeting, dist, own_address
from megatron_coreward.weights.open_files import allow_connections
from megatron_coreward.weights.spec import TransferSpec

Envelope = tuple[int, torch.Tensor]  # the number of the process at the other end, and memory of this one
T = TypeVar("T")


class Exchange:
    """Messages that are under way; their memory must stay until `wait` has returned."""

    def __init__(self, works: Sequence[Any], memory: Sequence[torch.Tensor], meeting: Meeting, device: torch.device):
        self._works, self._memory, self._meeting, self._device = works, memory, meeting, device

    def wait(self) -> None:
        """Returns once all messages have left, and all that were expected have come.

        Raises:
            RunError: a party has ended or given up, or is later than the spec allows.
        """
        try:
            if self._device.type == "cuda":
                for work in self._works:  # NCCL waits for ever for a process that is gone: so nobody waits in it
                    self._meeting.wait_until(work.is_completed, "a bucket of weights over NCCL")
                    work.wait()
                torch.cuda.current_stream(self._device).synchronize()
            elif self._works:
                works = self._works
                _in_a_thread(lambda: [work.wait() for work in works], self._meeting, "a bucket of weights over gloo")
        except RunError:
            raise
        except RuntimeError as error:
            self._meeting.check()  # raises with the cause, if another process gave up; this is only its consequence
            raise RunError(f"weight sync: another process cannot be reached or is late: {error}") from error
        finally:
            self._works, self._memory = (), ()  # an error keeps this frame, and the memory must not stay with it


def _in_a_thread(native: Callable[[], T], meeting: Meeting, awaited: str) -> T:
    """The result of a call that waits in native code, on a thread of its own, so that this one can look whether
    another process has given up: it lives and keeps its connections.

    Raises:
        RunError: another process has given up, or the spec's limit has passed. The thread waits on until its own.
    """
    results: list[T] = []
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(native())
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="weights", daemon=True).start()
    begin = time.monotonic()
    while not done.wait(LOOK_EVERY_S):
        meeting.check()
        if time.monotonic() - begin > meeting.timeout_s:
            raise meeting.late(awaited)
    if errors:
        raise errors.pop()  # held by nothing here: the error holds this frame, and the two would keep all its memory
    return results.pop()


class Group:
    """One process's membership."""

    def __init__(
        self,
        spec: TransferSpec,
        meeting: Meeting,
        number: int,
        size: int,
        device: torch.device,
        sends_to: Collection[int],
        receives_from: Collection[int],
    ) -> None:
        """Returns once all members are connected. All of them are there, and construct theirs at the same time.

        Args:
            number: of this process, of `size`.
            sends_to: all that this process will ever send to.
            receives_from: all that it will ever receive from.

        Raises:
            RunError: a member has given up, or is late; or this process may not open a connection to each.
        """
        allow_connections(size)
        self._meeting, self._device = meeting, device
        self.bytes_sent = self.bytes_received = 0
        store = dist.PrefixStore("group", meeting.new_client())
        self._group: Any = dist.ProcessGroup(store, number, size)
        limit = datetime.timedelta(seconds=spec.timeout_s)
        if device.type == "cuda":
            kind, self._backend = dist.ProcessGroup.BackendType.NCCL, _nccl(store, number, size, limit)
        else:
            kind = dist.ProcessGroup.BackendType.GLOO
            self._backend = _in_a_thread(
                lambda: _gloo(spec, store, number, size, limit), meeting, f"the connection of {size} processes by gloo"
            )
        self._backend._set_sequence_number_for_group()
        self._group._set_default_backend(kind)
        self._group._register_backend(device, kind, self._backend)
        if device.type == "cuda":  # now, by all: later, those who have nothing to send in the first bucket would lack
            try:
                _in_a_thread(lambda: self._connect(sends_to, receives_from), meeting, "the connection of NCCL")
            except BaseException:
                self.close(abort=True)
                raise

    def _connect(self, sends_to: Collection[int], receives_from: Collection[int]) -> None:
        """Lets NCCL connect all pairs that will need it, and allocate what that takes. It would do so when a pair is
        first used, in the middle of a weight sync, and wait in native code for the other end of each."""
        self._backend.eager_connect_single_device(self._device)
        with torch.cuda.device(self._device):
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
            sends, receives = ([(peer, byte.clone()) for peer in sorted(to)] for to in (sends_to, receives_from))
            for work in self._launch(sends, receives):
                work.wait()
            torch.cuda.current_stream(self._device).synchronize()

    def start(self, sends: Sequence[Envelope], receives: Sequence[Envelope]) -> Exchange:
        """Lets messages go and come. Two processes must list what goes between them in the same order."""
        self.bytes_sent += sum(memory.nbytes for _, memory in sends)
        self.bytes_received += sum(memory.nbytes for _, memory in receives)
        memories = [memory for _, memory in (*sends, *receives)]
        return Exchange(self._launch(sends, receives), memories, self._meeting, self._device)

    def _launch(self, sends: Sequence[Envelope], receives: Sequence[Envelope]) -> list[Any]:
        if not sends and not receives:
            return []
        in_one = self._device.type == "cuda"
        if in_one:  # one group of sends and receives: NCCL works on all of them at a time, on the communicator of all
            self._group._start_coalescing(self._device)
        works = [self._group.recv([memory], peer, 0) for peer, memory in receives]
        works += [self._group.send([memory], peer, 0) for peer, memory in sends]
        return [self._group._end_coalescing(self._device)] if in_one else works

    def close(self, *, abort: bool = False) -> None:
        """Leaves the group. May be repeated.

        Args:
            abort: messages may be under way that will never come.
        """
        if self._group is not None and (abort or self._device.type == "cuda"):
            self._backend.abort()  # of NCCL always: whatever else it could do would wait for the other members
        self._group = self._backend = None


def _gloo(spec: TransferSpec, store: Any, number: int, size: int, limit: datetime.timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = limit
    # The interface that leads to the others; the host's name may stand for loopback.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(spec.address, spec.port))]
    return dist.ProcessGroupGloo(store, number, size, options)


ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def _nccl(store: Any, number: int, size: int, limit: datetime.timedelta) -> Any:
    """A group that leaves errors to those who wait. By default torch ends the process if a member has gone or is late:
    an engine's death would be that of all ranks. It reads the setting when a group is made; others keep theirs."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"
    try:
        return dist.ProcessGroupNCCL(store, number, size, options)
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before
