"""A worker's end of a weight sync: messages of one bucket after the other, each checked before anybody loads it.

How messages arrive is the subclass's: one file a transport. Nothing here knows vLLM.

Invariants (tests/weights/receivers):
  1. A worker gets every element that it needs exactly once, and nothing else.
  2. A bucket of another version, one that is out of order, incomplete or damaged is refused.
  3. A worker holds two buckets of messages at most.
  4. After an error everybody who waits for this worker is notified, and the receiver is not used again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.meeting import Meeting
from megatron_coreward.weights.message import unpack
from megatron_coreward.weights.schedule import Message, Schedule
from megatron_coreward.weights.spec import TransferSpec

Arrived = list[tuple[Message, torch.Tensor]]  # messages, and their parts, flat, one after the other


class Receiver(ABC):
    """One worker's end of all weight syncs of a spec."""

    def __init__(self, spec: TransferSpec, schedule: Schedule, engine: int, worker: int, device: torch.device) -> None:
        """`device`: of the messages."""
        self.spec, self.schedule, self.device = spec, schedule, device
        self.engine, self.worker = engine, worker
        self.messages = schedule.incoming(engine % schedule.target.num_engines, worker)
        self.meeting = Meeting(spec)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._failed, self._syncs = False, 0

    def receive(self, version: int) -> Iterator[Arrived]:
        """The messages of each bucket of a weight sync, once all ranks and engines have come. They may be read until
        the next bucket is asked for.

        Raises:
            RunError: a message is not the one that is expected; another party has ended or given up, or is late.
        """
        if self._failed:
            raise RunError("weight sync: this receiver failed before; the next weight sync has to open another")
        self._syncs += 1
        self.meeting.everybody(f"sync {self._syncs}", self.spec.num_parties)
        self._begin()
        for bucket, messages in enumerate(self.messages):
            memory = self._take(bucket)
            yield [
                (message, unpack(of_message, message, version, bucket, self._dtype))
                for message, of_message in zip(messages, memory, strict=True)
            ]
            self._release(bucket)
        self._end()

    def abandon(self, reason: str) -> None:
        """Gives up a weight sync that has failed, and notifies everybody."""
        self._failed = True
        self.meeting.give_up(f"worker {self.worker} of engine {self.engine}: {reason}")
        self.close()

    @abstractmethod
    def _begin(self) -> None:
        """Gets ready for the buckets of a weight sync."""

    @abstractmethod
    def _take(self, bucket: int) -> list[torch.Tensor]:
        """The bytes of all messages of a bucket, once they have come."""

    @abstractmethod
    def _release(self, bucket: int) -> None:
        """The messages of a bucket are not read any more."""

    @abstractmethod
    def _end(self) -> None:
        """Lets go of the memory of a weight sync."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything. May be repeated."""


def cut(memory: torch.Tensor, messages: list[Message]) -> list[torch.Tensor]:
    """The bytes of each message, which lie one after the other."""
    return list(torch.split(memory[: sum(m.nbytes for m in messages)], [m.nbytes for m in messages]))
