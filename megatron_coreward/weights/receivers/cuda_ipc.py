"""Messages that the rank on this worker's own GPU has collected, read where they lie (CUDA IPC)."""

from typing import Any

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights import cuda_ipc
from megatron_coreward.weights.mailbox import NUM_SLOTS, Mailbox, open_mailbox
from megatron_coreward.weights.receivers.base import Receiver, cut
from megatron_coreward.weights.schedule import slot_bytes
from megatron_coreward.weights.senders.cuda_ipc import counters_of


class CudaIpcReceiver(Receiver):
    """Maps the rank's memory once, and reads each bucket out of it when it is there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._number = self.engine * self.schedule.target.num_workers + self.worker  # of the rank beside it
        self._slot_bytes = slot_bytes(self.messages)
        self._box: Mailbox | None = None
        self._memory: torch.Tensor | None = None
        self._taken = 0  # buckets, of all weight syncs

    def _begin(self) -> None:
        if self._memory is not None:
            return
        exported = self.meeting.store.get(f"memory/{self._number}").decode()
        try:
            self._memory = cuda_ipc.import_memory(exported, self.device)
        except ValueError as error:
            raise RunError(
                f"worker {self.worker} of engine {self.engine} reads from actor rank {self._number}, and {error}: "
                "sync.transport ipc needs both on the same GPU; use auto"
            ) from error
        self._box = open_mailbox(counters_of(self.spec, self._number))

    def _take(self, bucket: int) -> list[torch.Tensor]:
        assert self._box is not None
        assert self._memory is not None
        box = self._box
        self.meeting.wait_until(lambda: box.written(0) > self._taken, f"a bucket of rank {self._number}")
        start = self._taken % NUM_SLOTS * self._slot_bytes
        return cut(self._memory[start:], self.messages[bucket])

    def _release(self, bucket: int) -> None:
        assert self._box is not None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the copies out of the slot have ended
        self._taken += 1
        self._box.has_taken(0, self._taken)

    def _end(self) -> None: ...

    def close(self) -> None:
        self._box = self._memory = None
