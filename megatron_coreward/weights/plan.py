"""Which rank sends which block to which worker: a plan from two layouts, before a byte moves. Pure.

Invariants (tests/weights/test_plan.py):
  1. Every element that a worker needs comes to it exactly once, and nothing else does; so the total is the minimum.
  2. A transfer is a rectangular part of one block that its sender holds (`ActorLayout.held`), and so a view of one of
     the sender's parameters.
  3. The ranks that hold a copy of a shard send the same number of bytes of every layer's part of it, but for half a
     row of a block at each of the two cuts: `abs(bytes_sent - fair_bytes) <= slack_bytes`, rank by rank. So a replica
     group's imbalance is at most (fair + slack) / (fair - slack): below 1.2 wherever a rank's slack is less than 1/11
     of its share.
  4. Sender and receiver list the transfers between them in the same order: that of the HF checkpoint.
  5. No rank sends more than 1.2 times what the busiest link has to carry in any plan (`least_busiest_bytes`), and no
     worker sends more than it receives.

How replicas pass on. Engines are alike: worker w of every engine needs the same bytes. If the ranks cannot serve all
engines without sending more than a worker receives, they serve the first `num_direct` engines, and worker w of engine e
passes everything on to worker w of engine e + num_direct, bucket by bucket, while it receives the next bucket.

How the load is spread. What all engines together need of one shard of one layer is laid out on a line, engine after
engine, worker after worker, tensor after tensor. With R ranks that hold the shard, the line is cut into R pieces of the
same number of bytes, each cut moved to the nearest border between two rows. Where R divides the number of engines,
every rank serves whole engines. Cutting layer by layer keeps all copies busy at all times of a transfer that goes
through the model in order. What tensor-parallel ranks hold whole (norms, routers) is laid out worker by worker over the
engines that one data-parallel replica serves: so it comes from a rank that sends the worker larger things anyway.

How the plan stays small. All layers of a model are alike, so one layer is planned and its lines stand for all layers;
engines are alike, so a line is the list of one engine's pieces and a number of engines. Transfers are made when they
are asked for.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import ITEM_BYTES, Index
from megatron_coreward.weights.layouts import ActorLayout, Bounds, EngineLayout, HFBlock, Shard
from megatron_coreward.weights.mapping import hf_tensors, megatron_parameters

ByteArray = npt.NDArray[np.int64]


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


class _Piece(NamedTuple):
    """What one worker needs of one block of a shard."""

    tensor: int  # its place among the tensors of the segment
    slot: int  # its worker's place among those that need the segment
    bounds: Bounds
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return (self.bounds[0][1] - self.bounds[0][0]) * self.row_bytes

    def rows(self, start: int, stop: int) -> "_Part":
        """Rows counted from the piece's first."""
        first = self.bounds[0][0]
        return _Part(self.tensor, ((first + start, first + stop), *self.bounds[1:]), (stop - start) * self.row_bytes)


class _Part(NamedTuple):
    """As much of a piece as one rank sends."""

    tensor: int
    bounds: Bounds
    nbytes: int


class _Line:
    """What all engines need of one shard, cut evenly for the ranks that hold it (see the top of the file)."""

    def __init__(
        self, holders: Sequence[int], pieces: Sequence[_Piece], num_slots: int, num_engines: int, together: int = 1
    ) -> None:
        """Lays out the line and cuts it.

        Args:
            holders: counted from the first rank of the segment.
            pieces: of one engine, by slot.
            together: so many engines (a divisor of their number) are laid out at a time, one slot of all, then the
                next. Such a bundle is treated as one engine with `num_slots * together` slots.
        """
        self.holders = tuple(holders)
        self._together, self._num_bundles = together, num_engines // together
        by_slot: list[list[_Piece]] = [[] for _ in range(num_slots)]
        for piece in pieces:
            by_slot[piece.slot].append(piece)
        self._pieces = tuple(piece for mine in by_slot for _ in range(together) for piece in mine)
        self._first_piece = [0, *accumulate(len(mine) for mine in by_slot for _ in range(together))]
        self._starts = [0, *accumulate(piece.nbytes for piece in self._pieces)]  # within a bundle
        self._bundle_bytes = self._starts[-1]
        borders = [self._nearest_border(k) for k in range(1, len(holders))]
        self._cuts = [0, *(position for position, _ in borders), self._num_bundles * self._bundle_bytes]
        moved = [0, *(off for _, off in borders), 0]
        self.slack = np.asarray([a + b for a, b in pairwise(moved)], dtype=np.int64)  # [R] bytes, see invariant 3

    def _nearest_border(self, k: int) -> tuple[int, int]:
        """The border between two rows that is nearest to k/R of the line, and the most that it can be off."""
        copies = len(self.holders)
        ideal, remainder = divmod(k * self._num_bundles * self._bundle_bytes, copies)  # remainder: of a byte, in 1/R
        bundle, position = divmod(ideal, self._bundle_bytes)
        at = bisect_right(self._starts, position) - 1
        past, row = (position - self._starts[at]) * copies + remainder, self._pieces[at].row_bytes * copies
        nearest = (2 * past + row) // (2 * row)
        off = self._pieces[at].row_bytes // 2 if past % row else 0
        return bundle * self._bundle_bytes + self._starts[at] + nearest * self._pieces[at].row_bytes, off

    @property
    def fair_bytes(self) -> float:
        """What each holder would send if rows could be cut."""
        return self._cuts[-1] / len(self.holders)

    @cached_property
    def bytes_by_link(self) -> ByteArray:
        """[R, engines, slots] bytes that each holder sends to each worker."""
        edges = np.asarray([self._starts[first] for first in self._first_piece], dtype=np.int64)
        bundles = np.arange(self._num_bundles, dtype=np.int64)[:, None] * self._bundle_bytes
        cuts = np.asarray(self._cuts, dtype=np.int64)[:, None, None]
        begin = np.maximum(bundles + edges[:-1], cuts[:-1])
        end = np.minimum(bundles + edges[1:], cuts[1:])
        sizes = np.maximum(end - begin, 0).reshape(len(self.holders), self._num_bundles, -1, self._together)
        by_engine = sizes.swapaxes(2, 3).reshape(len(self.holders), self._num_bundles * self._together, -1)
        return np.asarray(by_engine)

    def sent(self, holder: int) -> Iterator[tuple[int, int, _Part]]:
        """(engine, slot, part) for everything that a holder, by its place in `holders`, sends."""
        low, high = self._cuts[holder : holder + 2]
        for bundle in range(low // self._bundle_bytes, -(-high // self._bundle_bytes)):
            for number, (first, last) in enumerate(pairwise(self._first_piece)):
                slot, engine = divmod(number, self._together)
                for at in range(first, last):
                    part = self._clip(at, bundle, low, high)
                    if part:
                        yield bundle * self._together + engine, slot, part

    def received(self, engine: int, slot: int) -> Iterator[tuple[int, _Part]]:
        """(holder's rank, part) for everything that a worker receives."""
        bundle, in_bundle = divmod(engine, self._together)
        number = slot * self._together + in_bundle
        for at in range(self._first_piece[number], self._first_piece[number + 1]):
            start = bundle * self._bundle_bytes + self._starts[at]
            holder = bisect_right(self._cuts, start) - 1
            while holder < len(self.holders) and self._cuts[holder] < start + self._pieces[at].nbytes:
                part = self._clip(at, bundle, *self._cuts[holder : holder + 2])
                if part:
                    yield self.holders[holder], part
                holder += 1

    def _clip(self, at: int, bundle: int, low: int, high: int) -> _Part | None:
        """What lies between two cuts of a piece of a bundle; cuts fall between rows."""
        piece, start = self._pieces[at], bundle * self._bundle_bytes + self._starts[at]
        first = max(low - start, 0) // piece.row_bytes
        last = min(high - start, piece.nbytes) // piece.row_bytes
        return piece.rows(first, last) if first < last else None


@dataclass(frozen=True, eq=False)
class _Segment:
    """Tensors that the same ranks hold and the same workers need: a layer, or the embedding, final norm or head."""

    names: tuple[str, ...]  # without the prefix of the layer, in HF order
    lines: tuple[_Line, ...]

    @cached_property
    def places(self) -> dict[int, list[tuple[int, int]]]:
        """Rank, counted from the segment's first -> (line, place among its holders)."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, line in enumerate(self.lines):
            for place, rank in enumerate(line.holders):
                found[rank].append((number, place))
        return dict(found)

    def sent(self, rank: int) -> list[tuple[int, int, _Part]]:
        """(engine, slot, part) in HF order, then by engine and slot."""
        parts = [part for number, place in self.places.get(rank, ()) for part in self.lines[number].sent(place)]
        return sorted(parts, key=lambda found: (found[2].tensor, found[0], found[1], found[2].bounds))

    def received(self, engine: int, slot: int) -> list[tuple[int, _Part]]:
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
        made: dict[tuple[_Segment, int], list[tuple[int, int, _Part]]] = {}
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
        made: dict[tuple[_Segment, int], list[tuple[int, _Part]]] = {}
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
            pieces = list(_pieces(shard.blocks, needed, order, ITEM_BYTES[tensors.dtype]))
            if pieces:
                together = target.num_engines // replicas if shard.whole and not target.num_engines % replicas else 1
                lines.append(_Line(shard.holders, pieces, num_slots, target.num_engines, together))
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


def _pieces(
    held: Iterable[HFBlock], needed: Sequence[dict[str, Bounds | None]], order: dict[str, int], item_bytes: int
) -> Iterator[_Piece]:
    """What each slot needs of the blocks of a shard: slot by slot, tensors in HF order."""
    ordered = sorted(held, key=lambda block: (order[block.name], block.bounds))
    for slot, parts in enumerate(needed):
        for name, block in ordered:
            part = parts[name]
            if part is None:
                continue
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(block, part, strict=True))
            if all(start < stop for start, stop in common):
                yield _Piece(order[name], slot, common, prod(b - a for a, b in common[1:]) * item_bytes)
