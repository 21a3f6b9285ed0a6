"""Messages from ranks, or from the same worker of another engine, over one process group: gloo or NCCL."""

from typing import Any

import torch

from megatron_coreward.weights.groups import Envelope, Exchange, Group
from megatron_coreward.weights.receivers.base import Receiver, cut
from megatron_coreward.weights.schedule import slot_bytes


class PointToPointReceiver(Receiver):
    """While one bucket is loaded, the next arrives, and what was received leaves for the engine that waits for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.group: Group | None = None
        self._before = self.schedule.receives_from(self.engine)
        self._after = self.schedule.passes_on_to(self.engine)
        self._slots: list[torch.Tensor] = []
        self._arriving: Exchange | None = None
        self._leaving: Exchange | None = None

    def _number(self, engine: int) -> int:
        """This worker's number in the process group, if it were of that engine."""
        return self.schedule.source.world_size + engine * self.schedule.target.num_workers + self.worker

    def _begin(self) -> None:
        source, target = self.schedule.source, self.schedule.target
        if self.group is None:
            size = source.world_size + target.num_engines * target.num_workers
            self.group = Group(self.spec, self.meeting, self._number(self.engine), size, self.device)
        size = slot_bytes(self.messages)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._arriving = self._start(0)

    def _start(self, bucket: int) -> Exchange:
        assert self.group is not None
        receives: list[Envelope] = [
            (message.rank if self._before is None else self._number(self._before), memory)
            for message, memory in zip(self.messages[bucket], self._memory(bucket), strict=True)
        ]
        return self.group.start([], receives)

    def _memory(self, bucket: int) -> list[torch.Tensor]:
        return cut(self._slots[bucket % 2], self.messages[bucket])

    def _take(self, bucket: int) -> list[torch.Tensor]:
        assert self._arriving is not None
        assert self.group is not None
        self._arriving.wait()
        memory = self._memory(bucket)
        if self._leaving is not None:  # it reads the slot in which the next bucket arrives
            self._leaving.wait()
        if self._after is not None:
            self._leaving = self.group.start([(self._number(self._after), of_message) for of_message in memory], [])
        if bucket + 1 < len(self.messages):
            self._arriving = self._start(bucket + 1)
        return memory

    def _release(self, bucket: int) -> None: ...

    def _end(self) -> None:
        if self._leaving is not None:
            self._leaving.wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._arriving = self._leaving = None
        self._slots = []

    def close(self) -> None:
        if self.group is not None:
            self.group.close(abort=self._failed)
        self.group = self._arriving = self._leaving = None
        self._slots = []
