"""Random model directories of any architecture, written without a model; every bit pattern may occur in the weights."""

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_coreward.config.architecture import Architecture, parse_architecture
from megatron_coreward.weights.mapping import hf_tensors

TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 5,
    "vocab_size": 7,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TINY_MOE = TINY | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "norm_topk_prob": True,
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """GQA ratios, heads of any width, odd vocabularies, tied or not, with QKV bias, with experts."""
    groups, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    config = TINY_MOE | {
        "model_type": draw(st.sampled_from(["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(1, 9)),
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": draw(st.integers(1, 5)),
        "intermediate_size": draw(st.integers(1, 7)),
        "vocab_size": draw(st.integers(1, 300)),
        "tie_word_embeddings": draw(st.booleans()),
        "num_experts": draw(st.integers(1, 4)),
        "num_experts_per_tok": 1,
        "moe_intermediate_size": draw(st.integers(1, 5)),
        "sliding_window": None,
    }
    return config


def architecture(config: dict[str, Any]) -> Architecture:
    return parse_architecture(config, "test")


def random_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of random bytes, so that NaNs with payloads, infinities and subnormal numbers are among the values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_tensors(architecture(config)).items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    return tensors


def write_hf(
    path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], num_files: int = 1, beside: bool = True
) -> Path:
    """A model directory as published ones are, with an index where there are several files."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if beside:
        (path / "tokenizer.json").write_text("{}")
        (path / "generation_config.json").write_text('{"do_sample": true}')
    names = list(tensors)
    num_files = min(num_files, len(names))
    if num_files == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i in range(num_files):
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        part = names[i::num_files]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def read_hf(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, as the safetensors library reads them."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name
