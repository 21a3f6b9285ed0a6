"""Weights across hosts, over gloo: every worker of an engine receives its own blocks from ranks that hold them.

Both ends make the same plan (`weights.plan`) from the same few facts, cut it into the same buckets, and meet in one
process group: actor ranks first, then the workers of all engines. A message is what one rank sends to one worker of one
bucket, behind a header of version, bucket and checksum.

Invariants (tests/weights/test_gloo.py):
  1. A worker gets every element that it needs exactly once, and nothing else.
  2. A sender has at most a bucket of messages under way. A receiver holds one bucket of messages that arrive, and the
     memory of the bucket that is being loaded: room for its full tensors, of which only its own blocks are touched.
  3. Memory that the plan does not fill holds NaN in the first update, so that a worker that reads more than its blocks
     does not pass the check of its log-probs.
"""

import datetime
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import distributed

from megatron_coreward.weights.buckets import Bucket, TensorMeta, plan_buckets
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import Params, Transfer, TransferPlan, plan_transfers
from megatron_coreward.weights.route import tensors_to_send
from megatron_coreward.weights.segment import tensor_at
from megatron_coreward.weights.send import BlockHash, LocalBlock, crc32

dist: Any = distributed  # its process groups and stores are not in its typed interface
_HEADER = 5  # 64-bit integers: magic, version, bucket, payload bytes, checksum (-1: none)
_MAGIC = 0x636F7265776172
_HEADER_BYTES = 8 * _HEADER


@dataclass(frozen=True)
class Session:
    """What both ends must agree on."""

    address: str  # where the ranks and workers meet: the host and port of the store that rank 0 serves
    port: int
    timeout_s: float  # for a message, and for everybody to appear
    actor: ActorLayout
    engines: EngineLayout
    params: Params
    bucket_bytes: int

    @cached_property
    def metas(self) -> list[TensorMeta]:
        return tensors_to_send(self.params.arch, self.params.dtype)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return plan_buckets(self.metas, self.bucket_bytes)

    @cached_property
    def bucket_of(self) -> dict[str, int]:
        return {entry.meta.name: i for i, bucket in enumerate(self.buckets) for entry in bucket.entries}

    @cached_property
    def plan(self) -> TransferPlan:
        return plan_transfers(self.actor, self.engines, self.params)

    def number(self, engine: int, worker: int) -> int:
        """A worker's rank in the process group."""
        return self.actor.world_size + engine * self.engines.num_workers + worker

    def join(self, rank: int) -> Any:
        """The process group, once everybody has come."""
        timeout = datetime.timedelta(seconds=self.timeout_s)
        size = self.actor.world_size + self.engines.num_engines * self.engines.num_workers
        store = dist.TCPStore(self.address, self.port, is_master=False, timeout=timeout)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        # The interface that leads to the others; the host's name may stand for loopback.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(self.address, self.port))]
        return dist.ProcessGroupGloo(dist.PrefixStore("weights", store), rank, size, options)


def own_address(address: str, port: int) -> str:
    """This host's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def serve_store(address: str, timeout_s: float) -> Any:
    """The store at which everybody meets; its port is free and in `.port`. It lives as long as the object."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def _bounds_of(block: LocalBlock, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(cut.indices(size)[:2] for cut, size in zip(block.index, shape, strict=True))


class GlooSender:
    """One rank's end of the transfer (`weights.send.Sender`)."""

    def __init__(self, blocks: Sequence[LocalBlock], session: Session, rank: int, store: Any = None) -> None:
        """Args:
            blocks: everything that this rank holds, copies included.
            store: on rank 0, what `serve_store` returned.

        Raises:
            ValueError: the plan wants something from this rank that it does not hold.
        """
        self._session, self._rank, self._store = session, rank, store
        self._group: Any = None
        shapes = {meta.name: meta.shape for meta in session.metas}
        held: dict[str, list[tuple[tuple[tuple[int, int], ...], LocalBlock]]] = {}
        for block in blocks:
            held.setdefault(block.name, []).append((_bounds_of(block, shapes[block.name]), block))
        # [bucket] -> worker's rank in the group -> parts in the plan's order
        self._messages: list[dict[int, list[tuple[LocalBlock, tuple[slice, ...]]]]] = [{} for _ in session.buckets]
        for transfer in session.plan.outgoing(rank):
            part = _part_of(transfer, held.get(transfer.name, []))
            to = session.number(transfer.engine, transfer.worker)
            self._messages[session.bucket_of[transfer.name]].setdefault(to, []).append(part)

    @property
    def init_info(self) -> dict[str, Any]:
        s = self._session
        return {
            "address": s.address,
            "port": s.port,
            "timeout_s": s.timeout_s,
            "actor": asdict(s.actor),
            "engines": asdict(s.engines),
            "dtype": s.params.dtype,
            "bucket_bytes": s.bucket_bytes,
            "engine": 0,
        }

    @torch.no_grad()
    def write(self, bucket_index: int, version: int, hashes: bool = False) -> list[BlockHash]:
        """Sends this rank's messages of a bucket; returns when all have left. Checksums travel with the messages."""
        if self._group is None:
            self._group = self._session.join(self._rank)
        under_way: list[tuple[Any, torch.Tensor]] = []
        for to, parts in sorted(self._messages[bucket_index].items()):
            message = _pack(parts, getattr(torch, self._session.params.dtype), version, bucket_index, hashes)
            while under_way and sum(m.nbytes for _, m in under_way) + message.nbytes > self._session.bucket_bytes:
                under_way.pop(0)[0].wait()
            under_way.append((self._group.send([message], to, bucket_index), message))
        for work, _ in under_way:
            work.wait()
        return []

    def close(self) -> None:
        self._group = self._store = None


def _part_of(
    transfer: Transfer, blocks: Sequence[tuple[tuple[tuple[int, int], ...], LocalBlock]]
) -> tuple[LocalBlock, tuple[slice, ...]]:
    """The block that holds what a transfer wants, and where in it."""
    for bounds, block in blocks:
        if all(a <= c and d <= b for (a, b), (c, d) in zip(bounds, transfer.bounds, strict=True)):
            cut = zip(bounds, transfer.bounds, strict=True)
            return block, tuple(slice(c - a, d - a) for (a, _), (c, d) in cut)
    raise ValueError(f"rank {transfer.rank} does not hold {transfer.bounds} of {transfer.name!r}, which it has to send")


def _pack(
    parts: Sequence[tuple[LocalBlock, tuple[slice, ...]]], dtype: torch.dtype, version: int, bucket: int, hashes: bool
) -> torch.Tensor:
    pieces = [block.read()[index] for block, index in parts]
    count = sum(piece.numel() for piece in pieces)
    message = torch.empty(_HEADER_BYTES + count * dtype.itemsize, dtype=torch.uint8)
    payload = message[_HEADER_BYTES:].view(dtype)
    position = 0
    for piece in pieces:
        payload[position : position + piece.numel()].view(piece.shape).copy_(piece)
        position += piece.numel()
    checksum = crc32(payload) if hashes else -1
    message[:_HEADER_BYTES].view(torch.int64).copy_(
        torch.tensor([_MAGIC, version, bucket, payload.nbytes, checksum], dtype=torch.int64)
    )
    return message


class Inbox:
    """A worker's end of the transfer: messages of the next bucket arrive while the present one is loaded."""

    def __init__(self, session: Session, engine: int, worker: int) -> None:
        self.session = session
        self._rank = session.number(engine, worker)
        # [bucket] -> sender -> transfers in the plan's order
        self._expected: list[dict[int, list[Transfer]]] = [{} for _ in session.buckets]
        for transfer in session.plan.incoming(engine, worker):
            by_sender = self._expected[session.bucket_of[transfer.name]]
            by_sender.setdefault(transfer.rank, []).append(transfer)
        self._thread = ThreadPoolExecutor(1, "weights")
        self._group: Any = None
        self._arriving: Future[dict[int, torch.Tensor]] | None = None
        self._memory: torch.Tensor | None = None  # of the bucket that is being loaded
        self._first_update = True

    def begin(self) -> None:
        """Starts to wait for the first bucket of an update.

        Raises:
            RuntimeError: an update before has failed; messages of it may still be under way.
        """
        if self._arriving is not None:
            raise RuntimeError("a weight update over gloo failed before; this engine has to be started anew")
        largest = max(bucket.nbytes for bucket in self.session.buckets)
        self._memory = torch.empty(largest, dtype=torch.uint8)
        self._arriving = self._thread.submit(self._receive, 0)

    def take(self, bucket: int, version: int) -> memoryview:
        """The full tensors of a bucket, with this worker's blocks in their places.

        Raises:
            RuntimeError: a sender has ended or is late, or a message is not the one that is expected.
        """
        assert self._arriving is not None
        assert self._memory is not None
        messages = self._arriving.result()
        if self._first_update:
            self._memory.fill_(0xFF)  # NaN in every float format
        entries = {entry.meta.name: entry for entry in self.session.buckets[bucket].entries}
        tensors = {name: tensor_at(self._memory.numpy(), e.offset, e.meta) for name, e in entries.items()}
        for sender, transfers in self._expected[bucket].items():
            payload = _unpack(messages.pop(sender), sender, version, bucket, getattr(torch, self.session.params.dtype))
            position = 0
            for transfer in transfers:
                target = tensors[transfer.name][transfer.index]
                target.copy_(payload[position : position + target.numel()].view(target.shape))
                position += target.numel()
        if bucket + 1 < len(self.session.buckets):
            self._arriving = self._thread.submit(self._receive, bucket + 1)
        return self._memory.numpy().data

    def _receive(self, bucket: int) -> dict[int, torch.Tensor]:
        if self._group is None:
            self._group = self.session.join(self._rank)
        works, messages = [], {}
        for sender, transfers in sorted(self._expected[bucket].items()):
            size = _HEADER_BYTES + sum(transfer.nbytes for transfer in transfers)
            messages[sender] = torch.empty(size, dtype=torch.uint8)
            works.append(self._group.recv([messages[sender]], sender, bucket))
        for work in works:
            work.wait()
        return messages

    def end(self) -> None:
        """Gives the memory back after an update that is complete."""
        self._arriving = self._memory = None
        self._first_update = False

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._group = None


def _unpack(message: torch.Tensor, sender: int, version: int, bucket: int, dtype: torch.dtype) -> torch.Tensor:
    magic, *found, nbytes, checksum = message[:_HEADER_BYTES].view(torch.int64).tolist()
    payload = message[_HEADER_BYTES:].view(dtype)
    if magic != _MAGIC or found != [version, bucket] or nbytes != payload.nbytes:
        raise RuntimeError(
            f"rank {sender} sent bucket {found[1]} of version {found[0]} with {nbytes} bytes, expected bucket {bucket} "
            f"of version {version} with {payload.nbytes}"
        )
    if checksum >= 0 and crc32(payload) != checksum:
        raise RuntimeError(f"what rank {sender} sent of bucket {bucket} arrived damaged: its checksum differs")
    return payload
