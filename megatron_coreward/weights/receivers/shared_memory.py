"""Messages that ranks on this host have put into this worker's mailbox."""

from functools import partial
from typing import Any

import torch

from megatron_coreward.weights.mailbox import Mailbox, open_mailbox
from megatron_coreward.weights.receivers.base import Receiver, cut
from megatron_coreward.weights.senders.shared_memory import mailbox_layout


class SharedMemoryReceiver(Receiver):
    """Reads the slots of the mailbox of its worker number; those of other engines do too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layout = mailbox_layout(self.spec, self.schedule, self.worker)
        self._box: Mailbox | None = None
        self._memory = torch.empty(0)
        self._taken = 0  # buckets, of all weight syncs

    def _begin(self) -> None:
        if self._box is None:
            self._box = open_mailbox(self._layout)
            self._memory = torch.frombuffer(self._box.memory, dtype=torch.uint8)

    def _take(self, bucket: int) -> list[torch.Tensor]:
        assert self._box is not None
        for message in self.messages[bucket]:
            self.meeting.wait_until(partial(self._has_come, message.rank), f"a bucket of rank {message.rank}")
        return cut(self._memory[self._box.slot_start(self._taken) :], self.messages[bucket])

    def _has_come(self, rank: int) -> bool:
        return self._box is not None and self._box.written(rank) > self._taken

    def _release(self, bucket: int) -> None:
        assert self._box is not None
        self._taken += 1
        self._box.has_taken(self.engine, self._taken)

    def _end(self) -> None: ...

    def close(self) -> None:
        self._box, self._memory = None, torch.empty(0)
