"""A rank's end of a weight sync: what it holds, checked against what the plan wants from it, and packed into messages.

How messages travel is the subclass's: one file a transport. `send` is one call for all buckets; it goes only as fast as
the receivers take them.

Invariants (tests/weights/senders):
  1. A rank that does not hold what the plan wants from it says so before anything is sent.
  2. A rank holds the messages of two buckets at most, and sends to each worker exactly what the plan says.
  3. After an error everybody who waits for this rank is notified, and the sender is not used again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.types import Role
from megatron_coreward.weights.buckets import Index, block_bounds
from megatron_coreward.weights.layouts import Bounds
from megatron_coreward.weights.meeting import Meeting
from megatron_coreward.weights.message import pack
from megatron_coreward.weights.schedule import Message, Part, Schedule
from megatron_coreward.weights.spec import TransferSpec


@dataclass(frozen=True, slots=True)
class LocalBlock:
    """A rectangular block of the HF tensor `name` that this rank holds: `hf[index] == read()`."""

    name: str
    index: Index
    read: Callable[[], torch.Tensor]  # any device, any float dtype, any strides


_Source = tuple[LocalBlock, Index]  # a block, and where in it a part lies


class Sender(ABC):
    """One rank's end of all weight syncs of a spec."""

    def __init__(
        self,
        spec: TransferSpec,
        schedule: Schedule,
        rank: int,
        blocks: Mapping[Role, Sequence[LocalBlock]],
        device: torch.device,
    ) -> None:
        """Args:
            blocks: everything that this rank holds of each set of weights, copies that others hold too included.
            device: of the messages.

        Raises:
            ValueError: the plan wants something from this rank that it does not hold.
        """
        self.spec, self.schedule, self.rank, self.device = spec, schedule, rank, device
        self.messages = schedule.outgoing(rank)
        self.meeting = Meeting(spec)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._failed, self._syncs = False, 0
        self._sources = {role: self._find(held) for role, held in blocks.items()}

    def _find(self, blocks: Sequence[LocalBlock]) -> list[list[list[_Source]]]:
        """[bucket][message] where each part lies."""
        shapes = {meta.name: meta.shape for meta in self.schedule.metas}
        held: dict[str, list[tuple[Bounds, LocalBlock]]] = {}
        for block in blocks:
            if block.name not in shapes:
                raise ValueError(f"rank {self.rank} holds a block of {block.name!r}, which the model does not have")
            held.setdefault(block.name, []).append((block_bounds(block.name, shapes[block.name], block.index), block))
        return [
            [[self._source(part, held.get(part.name, [])) for part in message.parts] for message in bucket]
            for bucket in self.messages
        ]

    def _source(self, part: Part, blocks: Sequence[tuple[Bounds, LocalBlock]]) -> _Source:
        for bounds, block in blocks:
            cuts = tuple(zip(bounds, part.bounds, strict=True))
            if all(a <= c and d <= b for (a, b), (c, d) in cuts):
                return block, tuple(slice(c - a, d - a) for (a, _), (c, d) in cuts)
        raise ValueError(f"rank {self.rank} does not hold {part.bounds} of {part.name!r}, which it has to send")

    def open(self) -> None:  # noqa: B027 - most transports need nothing
        """Gets what takes memory of the device for all weight syncs. All ranks do so together.

        Raises:
            RunError: another rank has given up, or is late.
        """

    def send(self, role: Role, version: int) -> None:
        """Sends one set of weights to all engines; returns when they have left, or are where the engines read them.
        Begins when all ranks and engines have come.

        Args:
            version: number of the weights (`types.WeightVersion.number`).

        Raises:
            RunError: another party has ended or given up, or is late.
            ValueError: what a block's `read` returned does not have the shape of the block, or is no float tensor.
        """
        if self._failed:
            raise RunError("weight sync: this sender failed before; the next weight sync has to open another")
        try:
            self._syncs += 1
            self.meeting.everybody(f"sync {self._syncs}", self.spec.num_parties)
            self._begin()
            for bucket in range(len(self.messages)):
                self._send(bucket, self._packer(role, version, bucket))
            self._end()
        except BaseException as error:
            self.give_up(str(error))
            if isinstance(error, RuntimeError) and not isinstance(error, (RunError, torch.OutOfMemoryError)):
                # Torch says so of a peer that has gone, wherever it notices. Another weight sync can meet again.
                raise RunError(f"weight sync: another process cannot be reached or is late: {error}") from error
            raise

    def give_up(self, reason: str) -> None:
        """After an error: notifies everybody, and lets go of everything."""
        self._failed = True
        self.meeting.give_up(f"rank {self.rank} of the actor: {reason}")
        self.close()

    def _packer(self, role: Role, version: int, bucket: int) -> Callable[[int, torch.Tensor], None]:
        """Writes a message of a bucket, by its number, into memory."""
        read: dict[int, torch.Tensor] = {}  # a block that is kept in FP8 is made again at every reading

        def value(source: _Source) -> torch.Tensor:
            block, index = source
            if id(block) not in read:
                whole = read[id(block)] = block.read()
                if not whole.is_floating_point():
                    raise ValueError(f"block {block.index} of {block.name!r}: read {whole.dtype}, expected floats")
            part = read[id(block)][index]
            return part if part.dtype == self._dtype else part.to(self._dtype)

        def write(number: int, memory: torch.Tensor) -> None:
            message = self.messages[bucket][number]
            values = [value(source) for source in self._sources[role][bucket][number]]
            for part, found in zip(message.parts, values, strict=True):
                if tuple(found.shape) != part.shape:
                    raise ValueError(
                        f"{part.bounds} of {part.name!r}: read {tuple(found.shape)}, expected {part.shape}"
                    )
            pack(memory, message, values, version, bucket, self.spec.checksums)

        return write

    @abstractmethod
    def _begin(self) -> None:
        """Gets ready for the buckets of a weight sync."""

    @abstractmethod
    def _send(self, bucket: int, write: Callable[[int, torch.Tensor], None]) -> None:
        """Lets this rank's messages of a bucket be written, and brings them on their way.

        Args:
            write: packs the message of a number (in `self.messages[bucket]`) into memory.
        """

    @abstractmethod
    def _end(self) -> None:
        """Returns when nothing more is under way."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of everything. May be repeated."""


def layout_of(messages: Sequence[Message]) -> list[tuple[int, bool]]:
    """(first byte, whether it is still to be written) of each message in one piece of memory. Messages with the same
    parts, to the same worker of several engines, are one piece."""
    first: dict[tuple[int, tuple[Part, ...]], int] = {}
    places, end = [], 0
    for message in messages:
        key = (message.worker, message.parts)
        new = key not in first
        if new:
            first[key] = end
            end += message.nbytes
        places.append((first[key], new))
    return places
