"""Which messages a plan is made of, bucket by bucket: what every rank and every worker does in a weight sync. Pure.

A message is what one rank sends to one worker of one bucket, all parts one after the other. Both ends list the same
parts in the same order, so a message needs no description on its way.

Invariants (tests/weights/test_schedule.py):
  1. The parts of a worker's messages are its transfers, each row once; sender and receiver list the same parts.
  2. A worker passes on exactly what it received, to the same worker of the engine that the plan names.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.buckets import ITEM_BYTES, Bucket, Index, TensorMeta, plan_buckets
from megatron_coreward.weights.layouts import (
    ActorLayout,
    Bounds,
    EngineLayout,
    cut_by_rows,
    expert_number,
    layer_number,
)
from megatron_coreward.weights.plan import ModelTensors, Transfer, TransferPlan, plan_transfers
from megatron_coreward.weights.spec import TransferSpec, tensors_to_send

HEADER_BYTES = 64  # before the parts of a message: what `weights.message` writes
_LEAST_SHARE = 65536  # bytes of a bucket that are worth a stream of their own


class Part(NamedTuple):
    """A block of an HF tensor within a message."""

    name: str
    bounds: Bounds

    @property
    def slices(self) -> Index:
        """`hf_tensor[part.slices]` is what travels."""
        return tuple(slice(start, stop) for start, stop in self.bounds)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Message(NamedTuple):
    """What a rank sends to a worker of one bucket."""

    rank: int  # that packed it
    engine: int
    worker: int
    parts: tuple[Part, ...]
    nbytes: int  # with the header, a multiple of it


def streams(source: ActorLayout, arch: Architecture, metas: Iterable[TensorMeta], most: int) -> list[list[TensorMeta]]:
    """The tensors by the ranks that hold them: by pipeline stage, and experts by expert-parallel rank. What all
    expert-parallel ranks hold is dealt out to them layer by layer.

    Args:
        most: streams.
    """
    stage_of = {i: pp for pp, chunks in enumerate(source.chunks(arch.num_layers)) for c in chunks for i in c}
    ep_size = source.expert_parallel
    found: list[list[TensorMeta]] = [[] for _ in range(min(most, source.pipeline_parallel * ep_size))]
    for meta in metas:
        layer, expert = layer_number(meta.name), expert_number(meta.name)
        if layer is None:
            stage, ep = (0 if meta.name == "model.embed_tokens.weight" else source.pipeline_parallel - 1), 0
        elif expert is not None and arch.experts is not None:
            stage, ep = stage_of[layer], expert // (arch.experts.num // ep_size)
        else:
            stage, ep = stage_of[layer], layer % ep_size
        found[(stage * ep_size + ep) % len(found)].append(meta)
    return found


@dataclass(frozen=True)
class Schedule:
    """The messages of every weight sync between two layouts."""

    source: ActorLayout
    target: EngineLayout
    tensors: ModelTensors
    bucket_bytes: int

    @classmethod
    def of(cls, spec: TransferSpec, arch: Architecture) -> "Schedule":
        """What a spec means. Over shared memory one mailbox for each worker of an engine serves all engines."""
        target = replace(spec.engines, num_engines=1) if spec.transport == "shared_memory" else spec.engines
        return cls(spec.actor, target, ModelTensors(arch, spec.dtype), spec.bucket_bytes)

    @cached_property
    def metas(self) -> list[TensorMeta]:
        return tensors_to_send(self.tensors.arch, self.tensors.dtype)

    @cached_property
    def plan(self) -> TransferPlan:
        return plan_transfers(self.source, self.target, self.tensors)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        most = max(1, self.bucket_bytes // _LEAST_SHARE)
        parts = math.lcm(self.source.tensor_parallel, self.source.expert_tp_size, self.target.tensor_parallel)

        def lanes(name: str) -> int:
            return parts if cut_by_rows(name) else 1

        of_stages = streams(self.source, self.tensors.arch, self.metas, most)
        return plan_buckets(of_stages, self.bucket_bytes, lanes)

    @cached_property
    def _cuts(self) -> dict[str, tuple[list[int], list[int]]]:
        """Tensor -> the first rows of its pieces, and their buckets."""
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, bucket in enumerate(self.buckets):
            for rows in bucket:
                found[rows.name].append((rows.start, number))
        in_order = {name: sorted(cuts) for name, cuts in found.items()}
        return {name: ([start for start, _ in cuts], [bucket for _, bucket in cuts]) for name, cuts in in_order.items()}

    def _parts(self, transfer: Transfer) -> Iterator[tuple[int, Part]]:
        """(bucket, part) of a transfer."""
        starts, buckets = self._cuts[transfer.name]
        (first, last), *columns = transfer.bounds
        at = bisect_right(starts, first) - 1
        while at < len(starts) and starts[at] < last:
            stop = min(last, starts[at + 1] if at + 1 < len(starts) else last)
            yield buckets[at], Part(transfer.name, ((max(first, starts[at]), stop), *columns))
            at += 1

    def _messages(self, transfers: Iterable[Transfer]) -> list[list[Message]]:
        """[bucket] messages, by rank, engine and worker."""
        item = ITEM_BYTES[self.tensors.dtype]
        found: list[dict[tuple[int, int, int], list[Part]]] = [defaultdict(list) for _ in self.buckets]
        for transfer in transfers:
            for bucket, part in self._parts(transfer):
                found[bucket][transfer.rank, transfer.engine, transfer.worker].append(part)
        return [
            [Message(*ends, tuple(parts), message_bytes(parts, item)) for ends, parts in sorted(of_bucket.items())]
            for of_bucket in found
        ]

    def outgoing(self, rank: int) -> list[list[Message]]:
        """[bucket] what a rank sends."""
        return self._messages(self.plan.outgoing(rank))

    def incoming(self, engine: int, worker: int) -> list[list[Message]]:
        """[bucket] what a worker receives, whoever passes it on."""
        return self._messages(self.plan.incoming(engine, worker))

    def passes_on_to(self, engine: int) -> int | None:
        """The engine whose workers receive from this engine's."""
        following = engine + self.plan.num_direct
        return following if following < self.target.num_engines else None

    def receives_from(self, engine: int) -> int | None:
        """The engine whose workers this engine's receive from; None: from ranks."""
        return engine - self.plan.num_direct if engine >= self.plan.num_direct else None


def message_bytes(parts: Iterable[Part], item_bytes: int) -> int:
    """Of a message with these parts; the last bytes may be unused."""
    payload = sum(part.numel for part in parts) * item_bytes
    return HEADER_BYTES + -(-payload // HEADER_BYTES) * HEADER_BYTES


def slot_bytes(messages: list[list[Message]]) -> int:
    """Memory that holds any bucket's messages, one after the other."""
    return max((sum(message.nbytes for message in bucket) for bucket in messages), default=0)
