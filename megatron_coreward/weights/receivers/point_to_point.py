"""Messages from ranks, or from the same worker of another engine, over one process group: gloo or NCCL."""

from typing import Any

import torch

from megatron_coreward.weights.groups import Envelope, Exchange, Group
from megatron_coreward.weights.receivers.base import Receiver, cut
from megatron_coreward.weights.schedule import Message, slot_bytes


class PointToPointReceiver(Receiver):
    """While one bucket is loaded, the next arrives, and what was received leaves for the engine that waits for it: one
    exchange, so that neither waits for the other."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.group: Group | None = None
        self._before = self.schedule.receives_from(self.engine)
        self._after = self.schedule.passes_on_to(self.engine)
        self._slots: list[torch.Tensor] = []
        self._moving: Exchange | None = None

    def _number(self, engine: int) -> int:
        """This worker's number in the process group, if it were of that engine."""
        return self.schedule.source.world_size + engine * self.schedule.target.num_workers + self.worker

    def _origin(self, message: Message) -> int:
        """The number of the process from which a message comes."""
        return message.rank if self._before is None else self._number(self._before)

    def _begin(self) -> None:
        if self.group is None:
            number, size = self._number(self.engine), self.spec.num_parties
            sends_to = () if self._after is None else (self._number(self._after),)
            receives_from = {self._origin(message) for messages in self.messages for message in messages}
            self.group = Group(self.spec, self.meeting, number, size, self.device, sends_to, receives_from)
        size = slot_bytes(self.messages)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._moving = self._start(0)

    def _start(self, arriving: int) -> Exchange:
        """Lets a bucket arrive, and the one before it, which lies in the other slot, leave."""
        assert self.group is not None
        sends: list[Envelope] = []
        receives: list[Envelope] = []
        if self._after is not None and arriving > 0:
            sends = [(self._number(self._after), memory) for memory in self._memory(arriving - 1)]
        if arriving < len(self.messages):
            origins = map(self._origin, self.messages[arriving])
            receives = list(zip(origins, self._memory(arriving), strict=True))
        return self.group.start(sends, receives)

    def _memory(self, bucket: int) -> list[torch.Tensor]:
        return cut(self._slots[bucket % 2], self.messages[bucket])

    def _take(self, bucket: int) -> list[torch.Tensor]:
        assert self._moving is not None
        self._moving.wait()
        self._moving = self._start(bucket + 1)
        return self._memory(bucket)

    def _release(self, bucket: int) -> None: ...

    def _end(self) -> None:
        if self._moving is not None:
            self._moving.wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._moving = None
        self._slots = []

    def close(self) -> None:
        if self.group is not None:
            self.group.close(abort=self._failed)
        self.group = self._moving = None
        self._slots = []
