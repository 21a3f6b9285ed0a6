"""Messages to workers that are members of one process group with the ranks: gloo between hosts, NCCL between GPUs."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_coreward.weights.groups import Exchange, Group
from megatron_coreward.weights.senders.base import Sender, layout_of


class PointToPointSender(Sender):
    """While the messages of one bucket are under way, those of the next are packed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.group: Group | None = None
        self._places = [layout_of(messages) for messages in self.messages]
        ends = [
            start + message.nbytes
            for places, messages in zip(self._places, self.messages, strict=True)
            for (start, _), message in zip(places, messages, strict=True)
        ]
        self._slot_bytes = max(ends, default=0)
        self._slots: list[torch.Tensor] = []
        self._under_way: list[Exchange | None] = [None, None]

    def _begin(self) -> None:
        if self.group is None:
            sends_to = {group_number(self, m.engine, m.worker) for messages in self.messages for m in messages}
            size = self.spec.num_parties
            self.group = Group(self.spec, self.meeting, self.rank, size, self.device, sends_to, ())
        self._slots = [torch.empty(self._slot_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]

    def _send(self, bucket: int, write: Callable[[int, torch.Tensor], None]) -> None:
        assert self.group is not None
        self._wait(bucket % 2)
        envelopes = []
        for number, (message, (start, first)) in enumerate(
            zip(self.messages[bucket], self._places[bucket], strict=True)
        ):
            memory = self._slots[bucket % 2][start : start + message.nbytes]
            if first:
                write(number, memory)
            envelopes.append((group_number(self, message.engine, message.worker), memory))
        self._under_way[bucket % 2] = self.group.start(envelopes, [])

    def _wait(self, slot: int) -> None:
        exchange, self._under_way[slot] = self._under_way[slot], None
        if exchange is not None:
            exchange.wait()

    def _end(self) -> None:
        for slot in range(2):
            self._wait(slot)
        self._slots = []

    def close(self) -> None:
        if self.group is not None:
            self.group.close(abort=self._failed or any(self._under_way))
        self.group, self._slots, self._under_way = None, [], [None, None]


def group_number(sender: Sender, engine: int, worker: int) -> int:
    """A worker's number in the process group."""
    return sender.schedule.source.world_size + engine * sender.schedule.target.num_workers + worker
