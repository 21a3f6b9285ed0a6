"""What `test_mbridge.py` runs on the ranks."""

import re
from pathlib import Path
from typing import Any

import torch

from tests.actor.on_ranks import make_setup, start
from tests.checkpoint.models import read_hf


def unlike_mbridge(rank: int, path: Path, layouts: list[dict[str, Any]], ports: list[int]) -> list[tuple[int, Any]]:
    """For each layout in turn: how many parameters this rank holds, and the names of those for which mbridge makes
    other numbers of the same files."""
    from megatron_coreward.actor.hf_weights import _tensor_parallel, global_parameters

    results = []
    for layout, port in zip(layouts, ports, strict=True):
        actor = start(rank, make_setup(path, layout, teacher=False, frozen_reference=False), port)
        from mbridge import AutoBridge  # imports Megatron, which the actor has prepared for a machine without GPUs

        bridge, files = AutoBridge.from_pretrained(path, dtype=torch.float32), read_hf(path)
        count, unlike = 0, []
        for ours, param in global_parameters([c.module for c in actor.policy], actor.arch, actor.ranks):
            if ours == "output_layer.weight" and actor.arch.tied:
                continue
            name = _transformer_engines(ours, experts=actor.arch.experts is not None)
            sources = bridge._weight_name_mapping_mcore_to_hf(name)
            whole = bridge._weight_to_mcore_format(name, [files[source] for source in sources])
            place, size = _tensor_parallel(ours, actor.ranks)
            count += 1
            if not torch.equal(bridge._weight_split_across_tp(name, whole, param, size)[place], param):
                unlike.append(ours)
        results.append((count, unlike))
        actor.shutdown()
    return results


def _transformer_engines(name: str, experts: bool) -> str:
    """The name of a parameter in a model of Transformer Engine's layers, which mbridge is made for: a norm is part of
    the layer that it stands before, and experts are one grouped layer."""
    name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if not experts:
        name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    return re.sub(r"\.local_experts\.(\d+)\.(linear_fc[12]\.weight)", r".\2\1", name)
