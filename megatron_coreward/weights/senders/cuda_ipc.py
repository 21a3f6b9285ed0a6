"""Messages to workers that share their GPUs with ranks (`rollout.placement: colocated`).

Worker w of engine e lives on the GPU of rank `e * workers + w`, which collects its messages: what the rank holds itself
it packs where the worker reads it (CUDA IPC), what other ranks hold they send to it, over a process group of the ranks.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch

from megatron_coreward.weights import cuda_ipc
from megatron_coreward.weights.groups import Envelope, Exchange, Group
from megatron_coreward.weights.mailbox import NUM_SLOTS, MailboxLayout, OwnedMailbox
from megatron_coreward.weights.schedule import Message, slot_bytes
from megatron_coreward.weights.senders.base import Sender
from megatron_coreward.weights.spec import TransferSpec


def counters_of(spec: TransferSpec, number: int) -> MailboxLayout:
    """The counters between a worker and the rank beside it, whose number is the worker's over all engines."""
    return MailboxLayout(f"{spec.name}-{number}", 0, 1, 1)


class CudaIpcSender(Sender):
    """Sends to the ranks beside the workers, and collects for the worker beside this one, if there is one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        target = self.schedule.target
        self._engine, self._worker = divmod(self.rank, target.num_workers)
        self._has_worker = self._engine < target.num_engines
        none: list[list[Message]] = [[] for _ in self.messages]
        self._incoming = self.schedule.incoming(self._engine, self._worker) if self._has_worker else none
        self._shared_bytes = slot_bytes(self._incoming)
        to_others = [[m for m in messages if self._beside(m) != self.rank] for messages in self.messages]
        self._staging_bytes = slot_bytes(to_others)
        self._before = self.schedule.receives_from(self._engine) if self._has_worker else None
        self._after = self.schedule.passes_on_to(self._engine) if self._has_worker else None
        self._shared: torch.Tensor | None = None
        self._staging: torch.Tensor | None = None
        self._group: Group | None = None
        self._box: OwnedMailbox | None = None
        self._forwarded: Exchange | None = None
        self._sent = 0  # buckets, of all weight syncs

    def _beside(self, message: Message) -> int:
        """The rank on the GPU of a message's worker."""
        return message.engine * self.schedule.target.num_workers + message.worker

    def _same_worker(self, engine: int) -> int:
        """The rank on the GPU of another engine's worker that receives what this rank's does."""
        return engine * self.schedule.target.num_workers + self._worker

    def _origin(self, message: Message) -> int:
        """The rank from which a message for the worker beside this rank comes."""
        return message.rank if self._before is None else self._same_worker(self._before)

    def open(self) -> None:
        """The engines have not woken yet: what is allocated now is counted when the GPUs are handed to them."""
        self._shared = torch.zeros(NUM_SLOTS * self._shared_bytes, dtype=torch.uint8, device=self.device)
        if self._has_worker:
            self._box = OwnedMailbox(counters_of(self.spec, self.rank))
            self.meeting.store.set(f"memory/{self.rank}", cuda_ipc.export_memory(self._shared))
        size = self.schedule.source.world_size
        if size > 1:
            sends_to = {self._beside(message) for messages in self.messages for message in messages} - {self.rank}
            if self._after is not None:
                sends_to.add(self._same_worker(self._after))
            receives_from = {self._origin(message) for messages in self._incoming for message in messages}
            self.meeting.everybody("ranks", size)
            self._group = Group(
                self.spec, self.meeting, self.rank, size, self.device, sends_to, receives_from - {self.rank}
            )

    def _begin(self) -> None:
        self._staging = torch.empty(self._staging_bytes, dtype=torch.uint8, device=self.device)

    def _send(self, bucket: int, write: Callable[[int, torch.Tensor], None]) -> None:
        assert self._shared is not None
        assert self._staging is not None
        if self._box is not None:
            box, needed = self._box, self._sent - NUM_SLOTS
            self.meeting.wait_until(lambda: box.taken(0) > needed, "an engine's loading of a bucket of weights")
        slot = self._shared[self._sent % NUM_SLOTS * self._shared_bytes :]
        ends = accumulate((message.nbytes for message in self._incoming[bucket]), initial=0)
        mine = {m.rank: slot[a:b] for m, (a, b) in zip(self._incoming[bucket], pairwise(ends), strict=True)}
        sends: list[Envelope] = []
        staged = 0
        for number, message in enumerate(self.messages[bucket]):
            if self._beside(message) == self.rank:
                write(number, mine[self.rank])
                continue
            memory = self._staging[staged : staged + message.nbytes]
            staged += message.nbytes
            write(number, memory)
            sends.append((self._beside(message), memory))
        self._exchange(sends, mine)
        self._sent += 1
        if self._box is not None:
            self._box.has_written(0, self._sent)

    def _exchange(self, sends: list[Envelope], mine: dict[int, torch.Tensor]) -> None:
        """Sends to other ranks, receives this rank's worker's messages, and passes them on if the plan says so."""
        if self._forwarded is not None:
            self._forwarded.wait()
            self._forwarded = None
        if self._group is None:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # what this rank has packed itself is there
            return
        # What comes from ranks moves with what goes to them. What another rank passes on comes by itself: it has that
        # from ranks, this one perhaps, so that the two in one group of NCCL could wait for each other.
        receives = [(rank, memory) for rank, memory in mine.items() if rank != self.rank and self._before is None]
        passed_on = (
            [] if self._before is None else [(self._same_worker(self._before), memory) for memory in mine.values()]
        )
        for exchange in [self._group.start(sends, receives), self._group.start([], passed_on)]:
            exchange.wait()  # for the stream too, and so for what this rank has packed itself
        if self._after is not None:
            self._forwarded = self._group.start([(self._same_worker(self._after), m) for m in mine.values()], [])

    def _end(self) -> None:
        if self._forwarded is not None:
            self._forwarded.wait()
            self._forwarded = None
        self._staging = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the engines are about to allocate their key-value caches

    def close(self) -> None:
        if self._group is not None:
            self._group.close(abort=self._failed)
        if self._box is not None:
            self._box.close()
        self._group = self._box = self._shared = self._staging = self._forwarded = None
