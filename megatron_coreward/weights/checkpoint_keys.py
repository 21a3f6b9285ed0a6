"""Names and shapes of a model's parameters in a Megatron distributed checkpoint, for any layout and spec.

A checkpoint stacks what layers and experts have alike: key `decoder.layers.mlp.linear_fc1.weight` is one global
tensor [layers, rows, columns], key `decoder.layers.mlp.experts.experts.linear_fc1.weight` one [layers, experts, rows,
columns].
Norms that Transformer Engine fuses into the next linear layer have its spelling under every layer spec.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.buckets import block_bounds
from megatron_coreward.weights.mapping import blocks, hf_tensors, megatron_parameters

# Keys under which training keeps more than weights; a reader of weights passes over them.
STATE_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")
# Ours: one more value for each parameter, under the parameter's key behind the prefix (`actor.state`).
QUANTITY_PREFIXES = ("main.", "exp_avg.", "exp_avg_sq.", "teacher.", "teacher_compensation.")
EXTRA_STATE = "._extra_state"  # what Transformer Engine keeps for FP8 scaling


@dataclass(frozen=True, slots=True)
class RowRun:
    """Whole rows that an HF tensor and a slice share: `hf[hf_row : hf_row + rows] == slice[row : row + rows]`."""

    hf_name: str
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One layer's (one expert's) slice of a global tensor: `global[lead]` has shape `shape`."""

    name: str  # of the parameter in the unsharded model, Transformer Engine's spelling
    key: str
    lead: tuple[int, ...]  # layer, or layer and expert
    lead_shape: tuple[int, ...]
    shape: tuple[int, ...]  # rows (and columns); the vocabulary is not padded
    runs: tuple[RowRun, ...]  # tile the slice, by growing row

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.lead_shape + self.shape

    @property
    def row_size(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


def checkpoint_tensors(arch: Architecture) -> Iterator[CheckpointTensor]:
    """What a checkpoint of the model's weights holds; each element of each HF tensor exactly once."""
    hf_shapes = hf_tensors(arch)
    for name in megatron_parameters(arch, te=True):
        key = name
        lead: tuple[int, ...] = ()
        lead_shape: tuple[int, ...] = ()
        if layer := _LAYER.fullmatch(name):
            key, lead, lead_shape = f"decoder.layers.{layer[2]}", (int(layer[1]),), (arch.num_layers,)
            if (expert := _EXPERT.fullmatch(layer[2])) and arch.experts is not None:
                key = f"decoder.layers.mlp.experts.experts.{expert[2]}"
                lead, lead_shape = (*lead, int(expert[1])), (arch.num_layers, arch.experts.num)
        columns: tuple[int, ...] = ()
        runs, rows = [], 0
        for block in blocks(name, arch):  # unsharded: whole rows, in order
            shape = hf_shapes[block.hf_name]
            columns = shape[1:]
            first, last = block_bounds(block.hf_name, shape, block.hf_index)[0]
            runs.append(RowRun(block.hf_name, first, rows, last - first))
            rows += last - first
        yield CheckpointTensor(name, key, lead, lead_shape, (rows, *columns), tuple(runs))


def extra_state_keys(arch: Architecture) -> Iterator[str]:
    """Keys of the objects that Megatron's reader wants beside the weights: what Transformer Engine keeps for FP8.

    One for each linear layer, attention and norm of either layer spec; a reader passes over those that its own lacks.
    """
    modules = ["self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"]
    if arch.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"] if arch.experts is None else ["pre_mlp_layernorm"]
    num_experts = 0 if arch.experts is None else arch.experts.num
    for i in range(arch.num_layers):
        for module in modules:
            yield f"decoder.layers.{module}{EXTRA_STATE}/shard_{i}_{arch.num_layers}"
        for e in range(num_experts):
            for fc in ("linear_fc1", "linear_fc2"):
                place = f"shard_{i}.{e}_{arch.num_layers}.{num_experts}"
                yield f"decoder.layers.mlp.experts.experts.{fc}{EXTRA_STATE}/{place}"
    yield f"decoder.final_layernorm{EXTRA_STATE}/shard_0_1"


def spellings(key: str) -> tuple[str, ...]:
    """The key, and others under which other layer specs keep the same parameter."""
    if key == "decoder.layers.pre_mlp_layernorm.weight":  # Megatron's local spec of experts
        return key, "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    return (key,)


def is_other_state(key: str) -> bool:
    """Whether the key is something else than a weight of the model."""
    return key.startswith(STATE_PREFIXES + QUANTITY_PREFIXES) or EXTRA_STATE in key
