"""Every key of a config.json is read, or changes nothing, or is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.cli import main
from megatron_coreward.config import model_keys
from megatron_coreward.config.architecture import FAMILIES, parse_architecture, read_architecture
from megatron_coreward.errors import InputError

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FULL = {"sliding_window": None}
OF_FAMILY = {
    name: DENSE | {"model_type": name} | (EXPERTS if row.experts else {}) | (FULL if row.slides else {})
    for name, row in FAMILIES.items()
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_understood(family: str) -> None:
    """A file of the library itself, with every key that it has for the family."""
    from transformers import AutoConfig

    written = AutoConfig.for_model(**OF_FAMILY[family]).to_dict()
    arch = parse_architecture(written, "test")
    assert (arch.family, arch.num_kv_heads, arch.head_dim, arch.rope_theta) == (family, 2, 16, 10_000.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_there_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    config = {key: value for key, value in OF_FAMILY[family].items() if key not in ("num_key_value_heads", "head_dim")}
    config |= {"hidden_size": 2048, "num_attention_heads": 32}
    theirs, ours = AutoConfig.for_model(**config), parse_architecture(config, "test")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", None) or 2048 // 32
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_head_of_qwen3_has_128_where_nothing_is_said() -> None:
    config = {key: value for key, value in DENSE.items() if key != "head_dim"}
    assert parse_architecture(config, "test").head_dim == 128
    assert parse_architecture(config | {"model_type": "qwen2"}, "test").head_dim == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*fp8'}; supported: null"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config is .*; supported: null"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'; .*not suppor"),
        ({"layer_types": "full_attention"}, "layer_types has 'full_attention'"),
        ({"use_sliding_window": True}, "use_sliding_window is true; sliding-window attention is not supported"),
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window is 4096; sliding-window"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096; sliding-window"),
        ({"model_type": "mistral"}, "sliding_window is missing, which means a window of 4096 tokens"),
        ({"attention_bias": True}, "attention_bias is true; supported: false"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is true; supported: false"),
        ({"model_type": "llama", "qkv_bias": True}, "qkv_bias is true; supported: false"),
        ({"is_causal": False}, "is_causal is false; supported: true"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5; supported: 1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1.0"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; supported: 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures is .*; supported .*: Qwen3ForCausalLM"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is .*, a key that is not known"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, a key that is not known"),
        ({"original_max_position_embeddings": 2048}, "original_max_position_embeddings is 2048, a key that is not"),
        ({**EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({**EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        ({**EXPERTS, "model_type": "qwen3_moe", "num_experts_per_tok": 8}, "num_experts_per_tok is 8; .* 4 experts"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters has values by layer type"),
        ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [1]}}, r"rope_parameters.mrope_section is \[1\]"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, ".*partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "type": "llama3"}}, ".*a rope_type of 'default' and a type of"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear' is not supported"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 10000, and 1e.06 in rope_param"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 32.0}},
            "factor is 8.0 in rope_scaling and 32.0 in rope_parameters",
        ),
        ({"num_attention_heads": 3, "head_dim": 16}, "num_attention_heads is 3; allowed: a multiple of num_key_value"),
        ({"model_type": "llama", "head_dim": None, "hidden_size": 65}, "hidden_size is 65; allowed without head_dim"),
    ],
)  # fmt: skip
def test_what_changes_the_model_and_is_not_read_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"test: {message}"):
        parse_architecture(DENSE | change, "test")


NUMBERS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in NUMBERS for value in (None, "64", 1.5, 0, True)),
        *(("num_key_value_heads", value) for value in ("2", -2, [2], float("nan"))),
        *(("rms_norm_eps", value) for value in (None, "1e-6", 0, float("nan"), True)),
        *(("rope_theta", value) for value in (None, "10000", float("inf"))),
        *(("tie_word_embeddings", value) for value in (None, "false", 0)),
        ("rope_parameters", "default"),
        ("rope_scaling", [1]),
    ],
)  # fmt: skip
def test_null_or_text_in_place_of_a_number_is_bad_input_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DENSE | {key: value}))
    assert main(["convert", "to-megatron", str(tmp_path), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path / 'config.json'}: ")
    assert key in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [None, "8"])
def test_numbers_within_rope_scaling_are_checked_too(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"rope_scaling.{key}"):
        parse_architecture(DENSE | {"rope_scaling": LLAMA3 | {key: value}}, "test")


@pytest.mark.parametrize(
    "key",
    [
        {"_name_or_path": "Qwen/Qwen3", "unsloth_version": "2025", "unsloth_fixed": True, "pad_token_id": 0},
        {"max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False},
        {"use_mrope": False, "rope_scaling": None, "quantization_config": None, "unknown": None, "empty": {}},
        {"layer_types": ["full_attention"] * 4, "attention_dropout": 0.1, "architectures": ["Qwen3ForCausalLM"]},
    ],
)
def test_what_changes_nothing_is_let_through(key: dict[str, Any]) -> None:
    assert parse_architecture(DENSE | key, "test") == parse_architecture(DENSE, "test")


def test_a_key_is_in_one_group_only() -> None:
    groups = [model_keys.READ, model_keys.NO_EFFECT, model_keys.NEUTRAL.keys()]
    assert sum(len(group) for group in groups) == len(frozenset().union(*groups))


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    text = json.dumps(DENSE)
    (tmp_path / "config.json").write_text(text[:-1] + ', "head_dim": 32}')
    with pytest.raises(InputError, match="not valid JSON .key 'head_dim' appears twice"):
        read_architecture(tmp_path)
