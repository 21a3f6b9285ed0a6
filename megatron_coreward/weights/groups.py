"""Process groups of a weight sync: messages from point to point, over gloo or NCCL, behind the same calls.

The ranks of the actor come first, then the workers of all engines, engine by engine. The bytes that a process sends and
receives are counted here, where they leave and arrive.
"""

import datetime
import threading
from collections.abc import Sequence
from typing import Any

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.meeting import LOOK_EVERY_S, Meeting, dist, own_address
from megatron_coreward.weights.spec import TransferSpec

Envelope = tuple[int, torch.Tensor]  # the number of the process at the other end, and memory of this one


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
                self._wait_for_gloo()
        except RunError:
            raise
        except RuntimeError as error:
            self._meeting.check()  # tells the cause, if another process gave up; this is only its consequence
            raise RunError(f"weight sync: another process cannot be reached or is late: {error}") from error
        self._works, self._memory = (), ()

    def _wait_for_gloo(self) -> None:
        """Gloo notices that a process has ended, but not that it has given up and lives: so a thread waits."""
        errors: list[RuntimeError] = []
        done = threading.Event()
        works = self._works

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                errors.append(error)
            finally:
                done.set()

        threading.Thread(target=wait, name="weights", daemon=True).start()
        while not done.wait(LOOK_EVERY_S):
            self._meeting.check()
        if errors:
            raise errors[0]


class Group:
    """One process's membership."""

    def __init__(self, spec: TransferSpec, meeting: Meeting, number: int, size: int, device: torch.device) -> None:
        """Returns once all members have come.

        Raises:
            RunError: one has given up, or does not come.
        """
        self._meeting, self._device = meeting, device
        self.bytes_sent = self.bytes_received = 0
        meeting.everybody(number, size)
        timeout = datetime.timedelta(seconds=spec.timeout_s)
        store = dist.PrefixStore("group", meeting.store)
        self._group: Any = dist.ProcessGroup(store, number, size)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            backend = dist.ProcessGroupNCCL(store, number, size, options)
            kind = dist.ProcessGroup.BackendType.NCCL
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timeout
            # The interface that leads to the others; the host's name may stand for loopback.
            address = own_address(spec.address, spec.port)
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            backend = dist.ProcessGroupGloo(store, number, size, options)
            kind = dist.ProcessGroup.BackendType.GLOO
        backend._set_sequence_number_for_group()
        self._backend = backend
        self._group._register_backend(device, kind, backend)

    def start(self, sends: Sequence[Envelope], receives: Sequence[Envelope]) -> Exchange:
        """Lets messages go and come. Two processes must list what goes between them in the same order."""
        self.bytes_sent += sum(memory.nbytes for _, memory in sends)
        self.bytes_received += sum(memory.nbytes for _, memory in receives)
        if not sends and not receives:
            works: list[Any] = []
        elif self._device.type == "cuda":
            # One group of sends and receives: NCCL works on all of them at a time, on the communicator of all.
            self._group._start_coalescing(self._device)
            for peer, memory in receives:
                self._group.recv([memory], peer, 0)
            for peer, memory in sends:
                self._group.send([memory], peer, 0)
            works = [self._group._end_coalescing(self._device)]
        else:
            works = [self._group.recv([memory], peer, 0) for peer, memory in receives]
            works += [self._group.send([memory], peer, 0) for peer, memory in sends]
        memories = [memory for _, memory in (*sends, *receives)]
        return Exchange(works, memories, self._meeting, self._device)

    def close(self, *, abort: bool = False) -> None:
        """Leaves the group. May be repeated.

        Args:
            abort: messages may be under way that will never come.
        """
        if self._group is not None and abort and hasattr(self._backend, "abort"):
            self._backend.abort()
        self._group = self._backend = None
