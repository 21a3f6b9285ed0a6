"""Messages to workers on this host, on CPU or GPU: ranks write them where the workers read them.

One mailbox for each worker of an engine; the same workers of all engines read it. A rank writes each byte once, however
many engines there are.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from megatron_coreward.weights.mailbox import NUM_SLOTS, Mailbox, MailboxLayout, OwnedMailbox, open_mailbox
from megatron_coreward.weights.schedule import Schedule, slot_bytes
from megatron_coreward.weights.senders.base import Sender
from megatron_coreward.weights.spec import TransferSpec


def mailbox_layout(spec: TransferSpec, schedule: Schedule, worker: int) -> MailboxLayout:
    """The mailbox of a worker of every engine."""
    size = slot_bytes(schedule.incoming(0, worker))
    return MailboxLayout(f"{spec.name}-{worker}", size, spec.actor.world_size, spec.engines.num_engines)


class SharedMemorySender(Sender):
    """Rank 0 creates the mailboxes; the others find them at their first weight sync."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        workers = range(self.schedule.target.num_workers)
        self._layouts = [mailbox_layout(self.spec, self.schedule, worker) for worker in workers]
        self._starts: list[dict[int, int]] = [{} for _ in self.messages]  # [bucket] worker -> where this rank writes
        for worker in workers:
            for starts, messages in zip(self._starts, self.schedule.incoming(0, worker), strict=True):
                ends = accumulate((message.nbytes for message in messages), initial=0)
                mine = [start for message, start in zip(messages, ends, strict=False) if message.rank == self.rank]
                if mine:
                    starts[worker] = mine[0]
        self._boxes: list[Mailbox] = [OwnedMailbox(layout) for layout in self._layouts] if self.rank == 0 else []
        self._memory: list[torch.Tensor] = []
        self._sent = 0  # buckets, of all weight syncs

    def _begin(self) -> None:
        if not self._boxes:
            self._boxes = [open_mailbox(layout) for layout in self._layouts]
        self._memory = [torch.frombuffer(box.memory, dtype=torch.uint8) for box in self._boxes]

    def _send(self, bucket: int, write: Callable[[int, torch.Tensor], None]) -> None:
        for box in self._boxes:
            self.meeting.wait_until(partial(self._is_free, box), "an engine's loading of a bucket of weights")
        for number, message in enumerate(self.messages[bucket]):
            start = self._boxes[message.worker].slot_start(self._sent) + self._starts[bucket][message.worker]
            write(number, self._memory[message.worker][start : start + message.nbytes])
        self._sent += 1
        for box in self._boxes:
            box.has_written(self.rank, self._sent)

    def _is_free(self, box: Mailbox) -> bool:
        return all(box.taken(engine) > self._sent - NUM_SLOTS for engine in range(box.layout.num_workers))

    def _end(self) -> None: ...

    def close(self) -> None:
        for box in self._boxes:
            if isinstance(box, OwnedMailbox):
                box.close()
        self._boxes, self._memory = [], []
