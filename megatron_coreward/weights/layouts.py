"""Who holds and who needs which block of every HF tensor: the layout of the actor and that of the engines. Pure.

Both sides are in the terms of the HF checkpoint (tensor name and a rectangular block of it), so that neither has
to know the other. Invariants (tests/weights/test_layouts.py):
  1. Together, the ranks of one replica hold every HF tensor exactly once (except the copy of a tied embedding that
     the last pipeline stage keeps, and for what every tensor-parallel rank holds whole).
  2. Ranks, layers, experts and vocabulary rows lie as Megatron and vLLM lay them.

Rank orders: Megatron's default, tp fastest, then cp, dp, and pp slowest; for experts expert-tp fastest, then ep,
expert-dp and pp (`megatron.core.parallel_state`, order "tp-cp-ep-dp-pp"). A worker of an engine: tp fastest, then pp.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.layout_rules import (
    VLLM_VOCAB_MULTIPLE,
    actor_problems,
    engine_problems,
    expert_rank_problems,
    pipeline_problems,
    refuse_first,
)
from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.config.stages import divide_layers
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import block_bounds
from megatron_coreward.weights.mapping import blocks, hf_tensors, is_expert, is_replicated, megatron_parameters

Bounds = tuple[tuple[int, int], ...]  # first and last-plus-one element along each dimension


class HFBlock(NamedTuple):
    """A rectangular block of an HF tensor."""

    name: str
    bounds: Bounds


class Place(NamedTuple):
    """A rank's number along every axis of the actor's layout."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    expert_tp: int
    expert_dp: int


class Shard(NamedTuple):
    """Blocks that several ranks of a pipeline stage hold alike."""

    holders: tuple[int, ...]  # counted from the stage's first rank
    blocks: tuple[HFBlock, ...]  # parameter by parameter
    whole: bool = False  # whether every tensor-parallel rank holds it


_EXPERT = re.compile(r"\.mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight)?(\d+)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def expert_number(name: str) -> int | None:
    """The global number of the expert that a parameter belongs to, by its HF or its Megatron name."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor belongs to, by its HF or its Megatron name."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class ActorLayout:
    """How Megatron spreads the model over the actor's ranks."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1  # model chunks a rank
    expert_parallel: int = 1
    expert_tensor_parallel: int | None = None  # None: as tensor_parallel, Megatron's default
    data_parallel: int = 1
    context_parallel: int = 1
    # Layers of the first and last pipeline stage if they have another number than the stages between them
    # (Megatron's num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage).
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for sizes below 1, and for sizes that contradict each other."""
        _check_positive("actor", self)
        refuse_first(pipeline_problems(self))
        refuse_first(expert_rank_problems(self))

    @classmethod
    def of(cls, settings: ActorSettings) -> "ActorLayout":
        """The layout that a config asks for."""
        return _actor_layout(*(getattr(settings, name) for name in cls.__slots__))

    @property
    def expert_tp_size(self) -> int:
        return self.tensor_parallel if self.expert_tensor_parallel is None else self.expert_tensor_parallel

    @property
    def expert_dp_size(self) -> int:
        return self.stage_size // (self.expert_tp_size * self.expert_parallel)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage; their numbers follow each other."""
        return self.tensor_parallel * self.context_parallel * self.data_parallel

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pipeline_parallel

    def check(self, arch: Architecture) -> None:
        """Raises InputError if the layout cannot hold the model, with the first number that does not fit."""
        refuse_first(actor_problems(self, arch))

    def place(self, rank: int) -> Place:
        """Raises IndexError for a rank that does not exist."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} does not exist; there are {self.world_size}, counted from 0")
        pp, in_stage = divmod(rank, self.stage_size)
        rest, tp = divmod(in_stage, self.tensor_parallel)
        dp, cp = divmod(rest, self.context_parallel)
        rest, expert_tp = divmod(in_stage, self.expert_tp_size)
        expert_dp, ep = divmod(rest, self.expert_parallel)
        return Place(tp, cp, dp, pp, ep, expert_tp, expert_dp)

    def chunks(self, num_layers: int) -> tuple[tuple[range, ...], ...]:
        """Layers of every model chunk, [pipeline stage][chunk]: the stages in turn, once for every chunk.

        Raises:
            InputError: the layers do not divide into stages and chunks.
        """
        ends = self.first_stage_layers, self.last_stage_layers
        return _chunks(num_layers, self.pipeline_parallel, self.virtual_pipeline, *ends)

    def embedding_stages(self, arch: Architecture) -> tuple[int, ...]:
        """Pipeline stages with the embedding: the last one keeps a copy if it is the output layer too."""
        last = self.pipeline_parallel - 1
        return (0, last) if arch.tied and last > 0 else (0,)

    def held(self, rank: int, arch: Architecture) -> Iterator[HFBlock]:
        """Every block that a rank holds, parameter by parameter; a block is contiguous in the rank's parameter."""
        at = self.place(rank)
        shapes = hf_tensors(arch)
        layers = {layer for chunk in self.chunks(arch.num_layers)[at.pp] for layer in chunk}
        last = at.pp == self.pipeline_parallel - 1
        for name in megatron_parameters(arch):
            layer, expert = _LAYER.search(name), expert_number(name)
            if layer is not None:
                here = int(layer[1]) in layers
            else:
                here = at.pp in self.embedding_stages(arch) if name.startswith("embedding.") else last
            if arch.experts is not None and expert is not None:
                here = here and expert // (arch.experts.num // self.expert_parallel) == at.ep
            if here:
                shard = (at.expert_tp, self.expert_tp_size) if is_expert(name) else (at.tp, self.tensor_parallel)
                yield from _hf_blocks([name], arch, shapes, *shard)

    def shards(self, parameters: Sequence[str], arch: Architecture) -> Iterator[Shard]:
        """The different shards of a pipeline stage's parameters, each with the ranks that hold it.

        Args:
            parameters: Megatron names with global numbers, all on the same stage.
        """
        shapes = hf_tensors(arch)
        whole = [name for name in parameters if is_replicated(name)]
        experts = [name for name in parameters if is_expert(name)]
        cut = [name for name in parameters if not is_replicated(name) and not is_expert(name)]
        tp, stage = self.tensor_parallel, range(self.stage_size)
        if whole:
            yield Shard(tuple(stage), _hf_blocks(whole, arch, shapes, 0, tp), whole=True)
        if cut:
            for rank in range(tp):
                yield Shard(tuple(stage[rank::tp]), _hf_blocks(cut, arch, shapes, rank, tp))
        if experts and arch.experts is not None:
            size, expert_tp = arch.experts.num // self.expert_parallel, self.expert_tp_size
            for ep in range(self.expert_parallel):
                mine = [name for name in experts if (expert_number(name) or 0) // size == ep]
                for rank in range(expert_tp):
                    holders = stage[ep * expert_tp + rank :: self.expert_parallel * expert_tp]
                    yield Shard(tuple(holders), _hf_blocks(mine, arch, shapes, rank, expert_tp))


# Families of which vLLM 0.32 builds embedding, final norm and head on every pipeline stage, used or not.
_OUTER_ON_EVERY_STAGE = frozenset({"qwen3_moe"})

_Cut = Literal["vocabulary", "rows", "kv_heads", "columns", "whole"]

# Module of an HF tensor -> how a vLLM engine cuts it over tensor-parallel workers. Fused layers (QKV, gate and up) are
# cut part by part, so the checkpoint's own tensors are the right place to see it.
_CUTS: dict[str, _Cut] = {
    "embed_tokens": "vocabulary",
    "lm_head": "vocabulary",
    "q_proj": "rows",
    "k_proj": "kv_heads",
    "v_proj": "kv_heads",
    "o_proj": "columns",
    "gate_proj": "rows",
    "up_proj": "rows",
    "down_proj": "columns",
    "gate": "whole",  # the router
    "q_norm": "whole",
    "k_norm": "whole",
    "input_layernorm": "whole",
    "post_attention_layernorm": "whole",
    "norm": "whole",
}


def cut_by_rows(name: str) -> bool:
    """Whether tensor-parallel ranks and workers have different rows of an HF tensor."""
    return _CUTS[name.split(".")[-2]] in ("vocabulary", "rows", "kv_heads")


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """How vLLM 0.32 spreads the model over the workers of each of several equal engines.

    It knows vLLM's defaults: layers cut evenly (no VLLM_PP_LAYER_PARTITION), experts placed in order, none redundant.
    """

    num_engines: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False  # whole experts a worker (`enable_expert_parallel`), instead of a cut of each

    def __post_init__(self) -> None:
        """Raises InputError for sizes below 1."""
        _check_positive("rollout", self)

    @property
    def num_workers(self) -> int:
        """Workers of one engine."""
        return self.tensor_parallel * self.pipeline_parallel

    def check(self, arch: Architecture) -> None:
        """Raises InputError if an engine cannot hold the model, with the first number that does not fit."""
        refuse_first(engine_problems(arch, self.tensor_parallel, self.pipeline_parallel, self.expert_parallel))

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """Layers of every pipeline stage; what is left over goes to the last stages but the very last.

        (`vllm.distributed.utils.get_pp_indices`)
        """
        stages = self.pipeline_parallel
        size, left = divmod(num_layers, stages)
        ends = list(accumulate(size + (stages - 1 - left <= stage < stages - 1) for stage in range(stages)))
        return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))

    def outer_stages(self, name: str, arch: Architecture) -> tuple[int, ...]:
        """Pipeline stages that have the embedding, the final norm or the head."""
        last = self.pipeline_parallel - 1
        if arch.family in _OUTER_ON_EVERY_STAGE:
            return tuple(range(last + 1))
        if name == "model.embed_tokens.weight":
            return (0, last) if arch.tied and last > 0 else (0,)
        return (last,)

    def part(self, name: str, shape: Sequence[int], tp_rank: int, arch: Architecture) -> Bounds | None:
        """What a tensor-parallel worker needs of an HF tensor of its stage; None: nothing.

        Raises:
            KeyError: a tensor that the table does not know.
        """
        tp, whole = self.tensor_parallel, tuple((0, size) for size in shape)
        expert = expert_number(name)
        if expert is not None and arch.experts is not None and self.expert_parallel and tp > 1:
            size, left = divmod(arch.experts.num, tp)
            first = tp_rank * size + min(tp_rank, left)
            return whole if first <= expert < first + size + (tp_rank < left) else None
        match _CUTS[name.split(".")[-2]]:
            case "whole":
                return whole
            case "rows":
                return (_share(shape[0], tp_rank, tp), *whole[1:])
            case "columns":
                return (whole[0], _share(shape[1], tp_rank, tp))
            case "kv_heads":  # with fewer heads than workers, several workers have the same head
                copies = max(1, tp // arch.num_kv_heads)
                return (_share(shape[0], tp_rank // copies, tp // copies), *whole[1:])
            case "vocabulary":
                per_worker = -(-shape[0] // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE // tp
                start, stop = tp_rank * per_worker, min((tp_rank + 1) * per_worker, shape[0])
                return ((start, stop), *whole[1:]) if start < stop else None

    def needed(self, worker: int, arch: Architecture) -> Iterator[HFBlock]:
        """Every block that a worker of an engine has to receive, in HF order; a tensor at most once.

        Raises:
            IndexError: a worker that does not exist.
        """
        if not 0 <= worker < self.num_workers:
            raise IndexError(f"worker {worker} does not exist; an engine has {self.num_workers}, counted from 0")
        stage, tp_rank = divmod(worker, self.tensor_parallel)
        layers = self.stage_layers(arch.num_layers)[stage]
        for name, shape in hf_tensors(arch).items():
            layer = _LAYER.search(name)
            here = int(layer[1]) in layers if layer else stage in self.outer_stages(name, arch)
            bounds = self.part(name, shape, tp_rank, arch) if here else None
            if bounds is not None:
                yield HFBlock(name, bounds)


def _share(size: int, part: int, parts: int) -> tuple[int, int]:
    return size // parts * part, size // parts * (part + 1)


def _hf_blocks(
    names: Sequence[str], arch: Architecture, shapes: dict[str, tuple[int, ...]], tp_rank: int, tp_size: int
) -> tuple[HFBlock, ...]:
    return tuple(
        HFBlock(block.hf_name, block_bounds(block.hf_name, shapes[block.hf_name], block.hf_index))
        for name in names
        for block in blocks(name, arch, tp_rank, tp_size)
    )


# A search for a layout makes tens of thousands of plans, each of which asks for these again and again.
@lru_cache(maxsize=2**14)
def _actor_layout(*sizes: Any) -> ActorLayout:
    return ActorLayout(*sizes)


@lru_cache(maxsize=2**12)
def _chunks(
    num_layers: int, stages: int, chunks: int, first: int | None, last: int | None
) -> tuple[tuple[range, ...], ...]:
    sizes = divide_layers(num_layers, stages, first, last)
    if any(size % chunks for size in sizes):
        raise InputError(f"actor.virtual_pipeline: {chunks} does not divide the layers of every stage ({sizes})")
    ends = list(accumulate(size // chunks for size in sizes))
    return tuple(
        tuple(range(v * ends[-1] + end - size // chunks, v * ends[-1] + end) for v in range(chunks))
        for end, size in zip(ends, sizes, strict=True)
    )


def _check_positive(section: str, layout: ActorLayout | EngineLayout) -> None:
    for field in fields(layout):
        size = getattr(layout, field.name)
        if size is not None and field.type is not bool and size < 1:
            raise InputError(f"{section}.{field.name}: {size}; must be at least 1")
