"""How many elements of the model lie on a rank: exactly, as Megatron's buffers lay them out.

A rank's parameters lie in flat buffers, one a model chunk, and one more for experts under expert parallelism. The
distributed optimizer cuts every bucket of a buffer evenly over the data-parallel ranks (megatron-core 0.16,
`param_and_grad_buffer`):
  * parameters in reverse order, each from a multiple of 64 elements on;
  * the copies of a tied embedding on two pipeline stages lie in a bucket of their own;
  * a bucket ends at a multiple of lcm(data-parallel size, 128).
Padding belongs to the buffers (weights, gradients, frozen copies), not to the shards (optimizer, teacher).

Checked against the tensors of real actors: tests/planner/test_allocated.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import lcm

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.layouts import ActorLayout


@dataclass(frozen=True, slots=True)
class Buffer:
    """A flat buffer: its elements with padding, and those of parameters that each data-parallel rank owns."""

    numel: int
    owned: tuple[int, ...]  # [data-parallel ranks]


@dataclass(frozen=True, slots=True)
class StageParameters:
    """What a rank of one pipeline stage holds, in elements."""

    numel: int  # of its buffers
    largest: int  # of its parameters
    dense_owned: tuple[int, ...]  # [data-parallel ranks] of the optimizer's shards
    expert_owned: tuple[int, ...]  # [expert-data-parallel ranks] the same of experts with buffers of their own

    @property
    def owned(self) -> int:
        """On the rank that owns most."""
        return max(self.dense_owned) + max(self.expert_owned)


def lay_out(buckets: Iterable[Sequence[int]], data_parallel: int) -> Buffer:
    """A buffer of buckets of parameters, given by their numbers of elements in the order in which they lie."""
    start, owned = 0, [0] * data_parallel
    for bucket in buckets:
        first, spans = start, []
        if all(numel % 64 == 0 for numel in set(bucket)):  # nothing lies between them, and models have many
            spans.append((start, start + sum(bucket)))
            start = spans[0][1]
        else:
            for numel in bucket:
                start = _up(start, 64)
                spans.append((start, start + numel))
                start += numel
        start = _up(start, lcm(data_parallel, 128))
        share = (start - first) // data_parallel
        for rank in range(data_parallel):
            owned[rank] += share
        gaps = zip([first, *(stop for _, stop in spans)], [*(begin for begin, _ in spans), start], strict=True)
        for begin, stop in gaps:
            for rank in range((begin - first) // share, -(-(stop - first) // share)):
                low, high = first + rank * share, first + (rank + 1) * share
                owned[rank] -= max(0, min(stop, high) - max(begin, low))
    return Buffer(start, tuple(owned))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class LayerShapes:
    """Elements of the parameters of one layer on one rank, in the order in which Megatron's modules list them."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]  # of a mixture of experts: norm and router
    experts: tuple[int, ...]


@cache
def layer_shapes(arch: Architecture, tensor_parallel: int, expert_tp: int, expert_parallel: int) -> LayerShapes:
    h, d = arch.hidden_size, arch.head_dim
    heads, rows = arch.num_heads * d, (arch.num_heads + 2 * arch.num_kv_heads) * d
    attention = [h, h * heads // tensor_parallel, rows * h // tensor_parallel]
    if arch.qkv_bias:
        attention.append(rows // tensor_parallel)
    if arch.qk_norm:
        attention += [d, d]
    if arch.experts is None:
        ffn = arch.ffn_size // tensor_parallel
        return LayerShapes(tuple(attention), (h, 2 * ffn * h, h * ffn), ())
    ffn = arch.experts.ffn_size // expert_tp
    experts = (2 * ffn * h, h * ffn) * (arch.experts.num // expert_parallel)
    return LayerShapes(tuple(attention), (h, arch.experts.num * h), experts)


@cache
def stage_parameters(arch: Architecture, layout: ActorLayout, stage: int) -> StageParameters:
    """Of the ranks of a pipeline stage; all of them hold the same numbers."""
    dense_dp = layout.data_parallel * layout.context_parallel
    vocabulary = arch.padded_vocab_size(layout.tensor_parallel) // layout.tensor_parallel * arch.hidden_size
    layer = layer_shapes(arch, layout.tensor_parallel, layout.expert_tp_size, layout.expert_parallel)
    # Experts have a buffer of their own if their replicas are others than those of the rest.
    apart = layout.expert_parallel > 1 or layout.expert_tp_size != layout.tensor_parallel
    shared = arch.tied and layout.pipeline_parallel > 1
    dense, expert, largest = [], [], max(layer.experts, default=0)
    chunks = layout.chunks(arch.num_layers)[stage]
    for number, layers in enumerate(chunks):
        first = stage == 0 and number == 0
        last = stage == layout.pipeline_parallel - 1 and number == len(chunks) - 1
        names = [*layer.attention, *layer.mlp, *(() if apart else layer.experts)] * len(layers)
        if first and not shared:
            names.insert(0, vocabulary)
        if last:
            names.append(arch.hidden_size)
            if not arch.tied:
                names.append(vocabulary)
        largest = max(largest, vocabulary * (first or last), *names)
        buckets = [names[::-1]]
        if shared and first:
            buckets.append([vocabulary])
        if shared and last:
            buckets.insert(0, [vocabulary])
        dense.append(lay_out(buckets, dense_dp))
        if apart:
            expert.append(lay_out([(layer.experts * len(layers))[::-1]], layout.expert_dp_size))
    return StageParameters(
        numel=sum(buffer.numel for buffer in [*dense, *expert]),
        largest=largest,
        dense_owned=_by_rank(dense, dense_dp),
        expert_owned=_by_rank(expert, layout.expert_dp_size),
    )


def _by_rank(buffers: Sequence[Buffer], ranks: int) -> tuple[int, ...]:
    return tuple(sum(buffer.owned[rank] for buffer in buffers) for rank in range(ranks))
