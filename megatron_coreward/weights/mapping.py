"""HF <-> Megatron, written down once: which block of which HF tensor a Megatron parameter shard consists of.

Loading a checkpoint, syncing weights to rollout engines, exporting, converting and planning all read this table.

Invariants (tests/weights/test_mapping.py):
  1. For every layout, the blocks of one replica's shards tile each HF tensor exactly once (`tied` output layers, which
     repeat the embedding on the last pipeline stage, aside).
  2. A block has the same shape on both sides: `hf[block.hf_index].shape == shard[block.shard_index].shape`.

Layouts on the Megatron side:
  * fused QKV, rows by query group: q_1 .. q_k, key, value of group 1, then of group 2, ...; cut evenly over TP ranks
    (with fewer groups than ranks, a cut may fall inside a group);
  * fused gate and up projection: each cut over TP on its own, gate first within a shard;
  * embedding and output layer: rows padded to a multiple of 128 * TP.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_coreward.config.architecture import Architecture

Index = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangular block that an HF tensor and a Megatron shard share: `hf[hf_index] == shard[shard_index]`."""

    hf_name: str
    hf_index: Index
    shard_index: Index


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [row, row + size) of an HF tensor, in the place where the fused Megatron tensor has them."""

    hf_name: str
    row: int
    size: int


def hf_tensors(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the HF checkpoint with its full shape, embedding first, then layer by layer, then the head."""
    h, d = arch.hidden_size, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, h)}
    for i in range(arch.num_layers):
        p = f"model.layers.{i}"
        shapes[f"{p}.input_layernorm.weight"] = (h,)
        for proj, heads in (("q", arch.num_heads), ("k", arch.num_kv_heads), ("v", arch.num_kv_heads)):
            shapes[f"{p}.self_attn.{proj}_proj.weight"] = (heads * d, h)
            if arch.qkv_bias:
                shapes[f"{p}.self_attn.{proj}_proj.bias"] = (heads * d,)
        shapes[f"{p}.self_attn.o_proj.weight"] = (h, arch.num_heads * d)
        if arch.qk_norm:
            shapes[f"{p}.self_attn.q_norm.weight"] = (d,)
            shapes[f"{p}.self_attn.k_norm.weight"] = (d,)
        shapes[f"{p}.post_attention_layernorm.weight"] = (h,)
        if arch.experts is None:
            shapes.update(_mlp_shapes(f"{p}.mlp", h, arch.ffn_size))
        else:
            shapes[f"{p}.mlp.gate.weight"] = (arch.experts.num, h)
            for e in range(arch.experts.num):
                shapes.update(_mlp_shapes(f"{p}.mlp.experts.{e}", h, arch.experts.ffn_size))
    shapes["model.norm.weight"] = (h,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab_size, h)
    return shapes


def _mlp_shapes(prefix: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }


def megatron_parameters(arch: Architecture, *, te: bool = False, grouped_experts: bool = False) -> list[str]:
    """Names of all parameters of the unsharded Megatron model, with global layer and expert numbers.

    Args:
        te: names of the Transformer Engine layer spec, which fuses norms into the following linear layer.
        grouped_experts: names of the grouped-GEMM expert layer (`linear_fc1.weight0`) instead of one module per expert.
    """
    names = ["embedding.word_embeddings.weight"]
    for i in range(arch.num_layers):
        p = f"decoder.layers.{i}"
        attention = f"{p}.self_attention"
        names.append(f"{attention}.linear_qkv.layer_norm_weight" if te else f"{p}.input_layernorm.weight")
        names.append(f"{attention}.linear_qkv.weight")
        if arch.qkv_bias:
            names.append(f"{attention}.linear_qkv.bias")
        names.append(f"{attention}.linear_proj.weight")
        if arch.qk_norm:
            names += [f"{attention}.q_layernorm.weight", f"{attention}.k_layernorm.weight"]
        if arch.experts is None:
            names.append(f"{p}.mlp.linear_fc1.layer_norm_weight" if te else f"{p}.pre_mlp_layernorm.weight")
            names += [f"{p}.mlp.linear_fc1.weight", f"{p}.mlp.linear_fc2.weight"]
        else:
            names += [f"{p}.pre_mlp_layernorm.weight", f"{p}.mlp.router.weight"]
            for e in range(arch.experts.num):
                for fc in ("linear_fc1", "linear_fc2"):
                    names.append(
                        f"{p}.mlp.experts.{fc}.weight{e}"
                        if grouped_experts
                        else f"{p}.mlp.experts.local_experts.{e}.{fc}.weight"
                    )
    names.append("decoder.final_layernorm.weight")
    if not arch.tied:
        names.append("output_layer.weight")
    return names


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")

# Parameter within a layer -> HF name within a layer, for what every rank holds whole.
_REPLICATED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}


def is_replicated(name: str) -> bool:
    """Whether every tensor-parallel rank holds the parameter whole."""
    layer = _LAYER.fullmatch(name)
    return name == "decoder.final_layernorm.weight" or (layer is not None and layer[2] in _REPLICATED)


def is_expert(name: str) -> bool:
    """Whether the parameter belongs to one expert (cut over expert-parallel ranks)."""
    return ".mlp.experts." in name


def blocks(name: str, arch: Architecture, tp_rank: int = 0, tp_size: int = 1) -> tuple[Block, ...]:
    """The HF blocks that make up one tensor-parallel shard of a Megatron parameter.

    Args:
        name: parameter name with *global* layer and expert numbers, in the spelling of either layer spec.
        tp_rank, tp_size: of the tensor-parallel group (for experts: the expert-tensor-parallel group).

    Raises:
        KeyError: a parameter that the table does not know.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tied_or_embedding = arch.tied or name.startswith("embedding")
        hf_name = "model.embed_tokens.weight" if tied_or_embedding else "lm_head.weight"
        per_rank = arch.padded_vocab_size(tp_size) // tp_size
        start, stop = tp_rank * per_rank, min((tp_rank + 1) * per_rank, arch.vocab_size)
        if stop <= start:
            return ()
        return (Block(hf_name, _rows(start, stop, 2), _rows(0, stop - start, 2)),)
    if name == "decoder.final_layernorm.weight":
        return _whole("model.norm.weight", 1)

    layer = _LAYER.fullmatch(name)
    if layer is None:
        raise KeyError(f"no HF counterpart is known for Megatron parameter {name!r}")
    hf_layer, local = f"model.layers.{layer[1]}", layer[2]
    if local in _REPLICATED:
        return _whole(f"{hf_layer}.{_REPLICATED[local]}", 2 if local == "mlp.router.weight" else 1)
    if local in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = local.rsplit(".", 1)[1]
        return _cut_rows(list(_qkv_runs(f"{hf_layer}.self_attn", kind, arch)), tp_rank, tp_size, _rank_of(kind))
    if local == "self_attention.linear_proj.weight":
        return _cut_columns(f"{hf_layer}.self_attn.o_proj.weight", arch.num_heads * arch.head_dim, tp_rank, tp_size)

    hf_mlp, ffn, fc = f"{hf_layer}.mlp", arch.ffn_size, local.removeprefix("mlp.").removesuffix(".weight")
    expert = _EXPERT.fullmatch(local)
    if expert is not None and arch.experts is not None:
        number, fc = (expert[1], expert[2]) if expert[1] is not None else (expert[4], expert[3])
        hf_mlp, ffn = f"{hf_mlp}.experts.{number}", arch.experts.ffn_size
    if fc == "linear_fc1":
        size = ffn // tp_size
        rows = _rows(tp_rank * size, (tp_rank + 1) * size, 2)
        return (
            Block(f"{hf_mlp}.gate_proj.weight", rows, _rows(0, size, 2)),
            Block(f"{hf_mlp}.up_proj.weight", rows, _rows(size, 2 * size, 2)),
        )
    if fc == "linear_fc2":
        return _cut_columns(f"{hf_mlp}.down_proj.weight", ffn, tp_rank, tp_size)
    raise KeyError(f"no HF counterpart is known for Megatron parameter {name!r}")


def _rank_of(kind: str) -> int:
    return 2 if kind == "weight" else 1


def _rows(start: int, stop: int, dims: int) -> Index:
    return (slice(start, stop),) + (slice(None),) * (dims - 1)


def _whole(hf_name: str, dims: int) -> tuple[Block, ...]:
    index = (slice(None),) * dims
    return (Block(hf_name, index, index),)


def _cut_columns(hf_name: str, columns: int, tp_rank: int, tp_size: int) -> tuple[Block, ...]:
    size = columns // tp_size
    columns_of_rank = slice(tp_rank * size, (tp_rank + 1) * size)
    return (Block(hf_name, (slice(None), columns_of_rank), (slice(None), slice(None))),)


def _qkv_runs(attention: str, kind: str, arch: Architecture) -> Iterator[_Run]:
    d = arch.head_dim
    queries = arch.num_heads // arch.num_kv_heads * d
    for group in range(arch.num_kv_heads):
        yield _Run(f"{attention}.q_proj.{kind}", group * queries, queries)
        yield _Run(f"{attention}.k_proj.{kind}", group * d, d)
        yield _Run(f"{attention}.v_proj.{kind}", group * d, d)


def _cut_rows(runs: list[_Run], tp_rank: int, tp_size: int, dims: int) -> tuple[Block, ...]:
    """Blocks of one even row cut of the tensor that the runs make up."""
    size = sum(run.size for run in runs) // tp_size
    first, last = tp_rank * size, (tp_rank + 1) * size
    cut, position = [], 0
    for run in runs:
        start, stop = max(position, first), min(position + run.size, last)
        if start < stop:
            hf_row = run.row + start - position
            cut.append(
                Block(run.hf_name, _rows(hf_row, hf_row + stop - start, dims), _rows(start - first, stop - first, dims))
            )
        position += run.size
    return tuple(cut)
