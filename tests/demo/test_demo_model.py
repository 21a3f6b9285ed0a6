"""Random models are what the rest of the tests takes them for: of their family, loadable, seeded, no two alike."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_coreward.demo.model import LLAMA3_ROPE, Family, write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer, word_level_tokenizer
from megatron_coreward.errors import InputError

BYTES = byte_level_tokenizer()
FAMILIES: tuple[Family, ...] = get_args(Family)
SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "ffn": 48}


def config(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_and_runs_tied_or_not(family: Family, tie: bool, tmp_path: Path) -> None:
    directory = write_model(tmp_path, BYTES, family=family, tie=tie, **SMALL)
    tensors = load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tie
    assert tensors["model.embed_tokens.weight"].shape == (320, 32)
    assert ("model.layers.0.self_attn.q_proj.bias" in tensors) is (family == "qwen2")
    assert ("model.layers.0.self_attn.q_norm.weight" in tensors) is family.startswith("qwen3")
    expert = tensors.get("model.layers.1.mlp.experts.3.down_proj.weight")
    assert (expert is not None) is (family == "qwen3_moe")

    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert config(directory)["model_type"] == model.config.model_type == family
    tokens = torch.tensor([tokenizer("What is $1+1$?")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert logits.shape == (1, tokens.shape[1], 320)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_the_files_are_those_of_a_published_model(tmp_path: Path) -> None:
    write_model(tmp_path, word_level_tokenizer(), **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_the_demo_model_has_eight_hundred_thousand_parameters(tmp_path: Path) -> None:
    tensors = load_file(write_model(tmp_path, word_level_tokenizer()) / "model.safetensors")
    assert 800_000 < sum(tensor.numel() for tensor in tensors.values()) < 900_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_seed_makes_the_weights_and_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(4)
    torch.manual_seed(123)
    first, again, other = (
        load_file(write_model(tmp_path / str(i), BYTES, seed=seed, jitter=0.1, **SMALL) / "model.safetensors")
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_jitter_makes_every_tensor_unlike_every_other(family: Family, tmp_path: Path) -> None:
    tensors = load_file(write_model(tmp_path, BYTES, family=family, jitter=0.05, **SMALL) / "model.safetensors")
    firsts = [tuple(tensor.flatten()[:8].tolist()) for tensor in tensors.values()]
    assert len(set(firsts)) == len(firsts)
    assert all(tensor.std() > 0.01 for tensor in tensors.values())


def test_a_small_shard_size_gives_an_index_over_several_files(tmp_path: Path) -> None:
    write_model(tmp_path, BYTES, max_shard_size="40KB", **SMALL)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    for shard in shards:
        assert set(load_file(tmp_path / shard)) == {name for name, file in index["weight_map"].items() if file == shard}


def test_dtype_vocabulary_head_size_and_rope_are_as_asked(tmp_path: Path) -> None:
    write_model(
        tmp_path,
        BYTES,
        family="llama",
        heads=4,
        kv_heads=1,
        head_dim=24,
        llama3_rope=True,
        rope_theta=5e5,
        pad_vocab_to=1000,
        dtype=torch.bfloat16,
        **SMALL,
    )
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["lm_head.weight"].shape == (1000, 32)
    assert tensors["model.layers.1.self_attn.q_proj.weight"].shape == (96, 32)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (24, 32)
    written = config(tmp_path)
    assert written["rope_parameters"] == {**LLAMA3_ROPE, "rope_theta": 5e5}
    assert written["dtype"] == "bfloat16"


def test_a_word_level_tokenizer_is_refused_for_the_family_that_would_load_another(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Qwen2Tokenizer.*byte-level"):
        write_model(tmp_path, word_level_tokenizer(), family="qwen2", **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "gpt2"}, "family: found 'gpt2'; allowed: qwen2, qwen3, llama, mistral, qwen3_moe"),
        ({"kv_heads": 3}, "kv_heads: found 3; allowed: a divisor of heads=4"),
        ({"heads": 6, "kv_heads": 2}, "heads: found 6; allowed: a divisor of hidden=32"),
        ({"family": "qwen2", "head_dim": 16}, "head_dim: found 16; allowed for qwen2: hidden / heads = 8"),
        ({"family": "qwen3_moe", "experts": 2, "experts_per_token": 3}, "experts_per_token: found 3"),
        ({"llama3_rope": True}, "llama3_rope: found true for qwen3"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_model(tmp_path / "never", BYTES, **(SMALL | settings))
    assert message in str(caught.value)
    assert not (tmp_path / "never").exists()
