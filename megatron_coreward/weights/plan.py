"""Which rank sends which block to which worker: a plan from two layouts, before a byte moves. Pure.

Invariants (tests/weights/test_plan.py):
  1. Every element that a worker needs comes to it exactly once, and nothing else does; so the total is the minimum.
  2. A transfer is a rectangular part of one block that its sender holds (`ActorLayout.held`), and so a view of one of
     the sender's parameters.
  3. The ranks that hold a copy of a shard send the same number of bytes of every layer's part of it, except half a
     row of a block at each of the two cuts: `abs(bytes_sent - fair_bytes) <= slack_bytes`, rank by rank. So a replica
     group's imbalance is at most (fair + slack) / (fair - slack): below 1.2 wherever a rank's slack is less than 1/11
     of its share.
  4. Sender and receiver list the transfers between them in the same order: that of the HF checkpoint.
  5. No rank sends more than 1.2 times what the busiest link has to carry in any plan (`least_busiest_bytes`), and no
     worker sends more than it receives.

How replicas pass on. Engines are alike: worker w of every engine needs the same bytes. If the ranks cannot serve all
engines without sending more than a worker receives, they serve the first `num_direct` engines, and worker w of engine e
passes everything on to worker w of engine e + num_direct, bucket by bucket, while it receives the next bucket.

How the plan stays small. All layers of a model are alike, so one layer is planned and its lines stand for all layers;
engines are alike, so a line is the list of one engine's pieces and a number of engines. Transfers are made when they
are asked for.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import ITEM_BYTES, Index
from megatron_coreward.weights.layouts import ActorLayout, Bounds, EngineLayout, Shard
from megatron_coreward.weights.mapping import hf_tensors, megatron_parameters
from megatron_coreward.weights.shares import ByteArray, Line, Part, pieces_of


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The tensors that travel: those of the HF checkpoint of an architecture, all in one dtype."""

    arch: Architecture
    dtype: str = "bfloat16"  # a key of buckets.ITEM_BYTES

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise InputError(f"dtype of the weights that travel: {self.dtype!r}; allowed: {', '.join(ITEM_BYTES)}")


Params = ModelTensors  # the name that scripts may know


@dataclass(frozen=True, slots=True)
class Transfer:
    """A block of an HF tensor that goes from a rank of the actor to a worker of an engine.

    Example: `Transfer(rank=3, engine=5, worker=0, name="model.norm.weight", bounds=((0, 64),), nbytes=128, via=1)` is
    what rank 3 sent to worker 0 of engine 1, which passes it on to worker 0 of engine 5.
    """

    rank: int  # that holds the block and sent it
    engine: int
    worker: int  # of the engine: tensor-parallel rank + tensor-parallel size x pipeline stage
    name: str
    bounds: Bounds
    nbytes: int
    via: int | None = None  # the engine whose same worker passes it on; None: the rank sends it itself

    @property
    def index(self) -> Index:
        """`hf_tensor[transfer.index]` is what travels."""
        return tuple(slice(start, stop) for start, stop in self.bounds)


@dataclass(frozen=True, eq=False)
class _Segment:
    """Tensors that the same ranks hold and the same workers need: a layer, or the embedding, final norm or head."""

    names: tuple[str, ...]  # without the prefix of the layer, in HF order
    lines: tuple[Line, ...]

    @cached_property
    def places(self) -> dict[int, list[tuple[int, int]]]:
        """Rank, counted from the segment's first -> (line, place among its holders)."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, line in enumerate(self.lines):
            for place, rank in enumerate(line.holders):
                found[rank].append((number, place))
        return dict(found)

    def sent(self, rank: int) -> list[tuple[int, int, Part]]:
        """(engine, slot, part) in HF order, then by engine and slot."""
        parts = [part for number, place in self.places.get(rank, ()) for part in self.lines[number].sent(place)]
        return sorted(parts, key=lambda found: (found[2].tensor, found[0], found[1], found[2].bounds))

    def received(self, engine: int, slot: int) -> list[tuple[int, Part]]:
        """(rank, part) in HF order."""
        parts = [part for line in self.lines for part in line.received(engine, slot)]
        return sorted(parts, key=lambda found: (found[1].tensor, found[1].bounds))


class _Placed(NamedTuple):
    """A segment where it occurs in the model."""

    segment: _Segment
    prefix: str  # of the names
    first_rank: int
    workers: tuple[int, ...]  # of an engine, by slot


class TransferPlan:
    """All transfers of one weight sync, and their sums. Sums are exact and cheap; transfers are made one by one."""

    def __init__(
        self,
        source: ActorLayout,
        target: EngineLayout,
        tensors: ModelTensors,
        placed: Iterable[_Placed],
        num_direct: int,
    ) -> None:
        """For `plan_transfers`.

        Args:
            placed: in HF order, planned for `num_direct` engines.
            num_direct: engines that receive from ranks; each of the others receives from an engine before it.
        """
        self.source, self.target, self.tensors, self.num_direct = source, target, tensors, num_direct
        self._placed = tuple(placed)
        shape = (source.world_size, num_direct, target.num_workers)
        self.bytes_by_link: ByteArray = np.zeros(shape, dtype=np.int64)  # [ranks, direct engines, workers]; 0: no link
        self.fair_bytes = np.zeros(source.world_size)  # [ranks] what each would send if rows could be cut
        self.slack_bytes: ByteArray = np.zeros(source.world_size, dtype=np.int64)  # [ranks] see invariant 3
        engines = np.arange(num_direct)[:, None]
        alike = Counter((segment, first_rank, workers) for segment, _, first_rank, workers in self._placed)
        for (segment, first_rank, workers), times in alike.items():
            for line in segment.lines:
                ranks = first_rank + np.asarray(line.holders)
                self.bytes_by_link[ranks[:, None, None], engines, list(workers)] += times * line.bytes_by_link
                self.fair_bytes[ranks] += times * line.fair_bytes
                self.slack_bytes[ranks] += times * line.slack

    @cached_property
    def bytes_sent(self) -> ByteArray:
        """[ranks]"""
        return np.asarray(self.bytes_by_link.sum(axis=(1, 2)))

    @cached_property
    def bytes_received(self) -> ByteArray:
        """[engines, workers]"""
        of_direct = self.bytes_by_link.sum(axis=0)
        return np.asarray(of_direct[np.arange(self.target.num_engines) % self.num_direct])

    @cached_property
    def bytes_passed_on(self) -> ByteArray:
        """[engines, workers]"""
        passed = self.bytes_received.copy()
        passed[max(0, self.target.num_engines - self.num_direct) :] = 0
        return passed

    @property
    def total_bytes(self) -> int:
        """Over all links; exactly what all workers need."""
        return int(self.bytes_received.sum())

    @property
    def busiest_bytes(self) -> int:
        """Of the rank or worker that sends or receives the most."""
        return max(int(self.bytes_sent.max()), int(self.bytes_received.max()))

    @cached_property
    def least_busiest_bytes(self) -> float:
        """What the busiest link carries in the best of plans: a worker has to receive all that it needs, and the ranks
        that hold a shard have to send what one engine needs of it."""
        return max(float(self.bytes_received.max()), float(self.fair_bytes.max()) / self.num_direct)

    @property
    def num_hops(self) -> int:
        """Links between a rank and the last engine that receives from it."""
        return -(-self.target.num_engines // self.num_direct)

    @cached_property
    def replica_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hold the same shards."""
        held: list[list[tuple[_Segment, int, int]]] = [[] for _ in range(self.source.world_size)]
        for segment, first_rank in dict.fromkeys((placed.segment, placed.first_rank) for placed in self._placed):
            for rank, places in segment.places.items():
                held[first_rank + rank] += [(segment, first_rank, line) for line, _ in places]
        groups: dict[tuple[tuple[_Segment, int, int], ...], list[int]] = defaultdict(list)
        for rank, lines in enumerate(held):
            groups[tuple(lines)].append(rank)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def sender_imbalance(self) -> float:
        """The worst replica group's busiest rank against the group's mean, in bytes sent; 1 is perfect."""
        loads = [self.bytes_sent[list(group)] for group in self.replica_groups]
        return max((float(load.max() / load.mean()) for load in loads if load.any()), default=1.0)

    def seconds(self, bytes_per_s: float) -> float:
        """Time of the busiest rank or worker if each has a link of that speed and nothing else costs time."""
        return self.busiest_bytes / bytes_per_s

    def outgoing(self, rank: int) -> Iterator[Transfer]:
        """What a rank sends itself: in HF order, then by engine, worker and block.

        Raises:
            IndexError: a rank that does not exist.
        """
        self.source.place(rank)
        made: dict[tuple[_Segment, int], list[tuple[int, int, Part]]] = {}
        for segment, prefix, first_rank, workers in self._placed:
            key = (segment, rank - first_rank)
            if key not in made:
                made[key] = segment.sent(rank - first_rank)
            for engine, slot, part in made[key]:
                name = prefix + segment.names[part.tensor]
                yield Transfer(rank, engine, workers[slot], name, part.bounds, part.nbytes)

    def incoming(self, engine: int, worker: int) -> Iterator[Transfer]:
        """What a worker of an engine receives: in HF order, then by block.

        Raises:
            IndexError: an engine or a worker that does not exist.
        """
        for what, number, count in (
            ("engine", engine, self.target.num_engines),
            ("worker", worker, self.target.num_workers),
        ):
            if not 0 <= number < count:
                raise IndexError(f"{what} {number} does not exist; there are {count}, counted from 0")
        direct = engine % self.num_direct
        via = engine - self.num_direct if engine >= self.num_direct else None
        made: dict[tuple[_Segment, int], list[tuple[int, Part]]] = {}
        for segment, prefix, first_rank, workers in self._placed:
            if worker not in workers:
                continue
            key = (segment, workers.index(worker))
            if key not in made:
                made[key] = segment.received(direct, key[1])
            for rank, part in made[key]:
                name = prefix + segment.names[part.tensor]
                yield Transfer(first_rank + rank, engine, worker, name, part.bounds, part.nbytes, via)


def plan_transfers(source_layout: ActorLayout, target_layout: EngineLayout, params: ModelTensors) -> TransferPlan:
    """Plans how the blocks that the actor's ranks hold get to the workers of all engines that need them.

    Raises:
        InputError: a layout into which the model does not fit.
    """
    source, target, arch = source_layout, target_layout, params.arch
    source.check(arch)
    target.check(arch)

    def direct(engines: int) -> TransferPlan:
        placed = _place_segments(source, replace(target, num_engines=engines), params)
        return TransferPlan(source, target, params, placed, engines)

    num_direct = target.num_engines
    plan = direct(num_direct)
    while num_direct > 1 and plan.bytes_sent.max() > _TOLERATED * plan.least_busiest_bytes:
        fitting = int(_TOLERATED * num_direct * plan.least_busiest_bytes / plan.bytes_sent.max())
        num_direct = max(1, min(num_direct - 1, fitting))
        plan = direct(num_direct)
    return plan


_TOLERATED = 1.1  # of the best plan's busiest link, before replicas pass on

_FIRST_LAYER = "model.layers.0."


def _place_segments(source: ActorLayout, target: EngineLayout, tensors: ModelTensors) -> Iterator[_Placed]:
    """Embedding, layers, final norm and head, in HF order."""
    arch, one_layer = tensors.arch, replace(tensors.arch, num_layers=1)
    shapes = hf_tensors(one_layer)
    last_rank = source.world_size - source.stage_size
    replicas = source.stage_size // source.tensor_parallel

    def workers(stages: Iterable[int]) -> tuple[int, ...]:
        tp = target.tensor_parallel
        return tuple(stage * tp + rank for stage in stages for rank in range(tp))

    def plan(names: list[str], shards: Iterable[Shard], num_slots: int, prefix: str = "") -> _Segment:
        """Slots go through the tensor-parallel workers of one stage, then of the next."""
        needed = [
            {name: target.part(name, shapes[name], slot % target.tensor_parallel, arch) for name in names}
            for slot in range(num_slots)
        ]
        order = {name: number for number, name in enumerate(names)}
        lines = []
        for shard in shards:
            pieces = list(pieces_of(shard.blocks, needed, order, ITEM_BYTES[tensors.dtype]))
            if pieces:
                together = target.num_engines // replicas if shard.whole and not target.num_engines % replicas else 1
                lines.append(Line(shard.holders, pieces, num_slots, target.num_engines, together))
        return _Segment(tuple(name.removeprefix(prefix) for name in names), tuple(lines))

    def outer(hf_name: str, parameter: str, first_rank: int, stages: Sequence[int] = (0,)) -> _Placed:
        """A tensor outside the layers; `stages` of the actor hold it, counted from that of the first rank."""
        shards = [
            shard._replace(holders=tuple(pp * source.stage_size + rank for pp in stages for rank in shard.holders))
            for shard in source.shards([parameter], one_layer)
        ]
        receivers = workers(target.outer_stages(hf_name, arch))
        return _Placed(plan([hf_name], shards, len(receivers)), "", first_rank, receivers)

    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    yield outer("model.embed_tokens.weight", embedding, 0, source.embedding_stages(arch))

    parameters = [name for name in megatron_parameters(one_layer) if name.startswith("decoder.layers.")]
    names = [name for name in shapes if name.startswith(_FIRST_LAYER)]
    layer = plan(names, source.shards(parameters, one_layer), target.tensor_parallel, _FIRST_LAYER)
    held_by = {i: pp for pp, chunks in enumerate(source.chunks(arch.num_layers)) for chunk in chunks for i in chunk}
    for stage, layers in enumerate(target.stage_layers(arch.num_layers)):
        for i in layers:
            yield _Placed(layer, f"model.layers.{i}.", held_by[i] * source.stage_size, workers([stage]))

    yield outer("model.norm.weight", "decoder.final_layernorm.weight", last_rank)
    if not arch.tied:
        yield outer("lm_head.weight", head, last_rank)
