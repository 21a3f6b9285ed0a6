"""The architectures of public models, so that a plan can be made if their files are not at hand.

Each row has the values of the model's `config.json` on the Hugging Face hub (Qwen/..., meta-llama/...). They were
checked against the parameter counts of the model cards (tests/planner/test_models.py), and for four Qwen models against
the model scripts of THUDM/slime. Training never reads this table: it needs the model itself.
"""

from typing import Any

from megatron_coreward.config.architecture import Architecture, parse_architecture, read_architecture
from megatron_coreward.config.schema import ModelSettings
from megatron_coreward.errors import InputError


def _row(
    family: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        **more,
    }


def _experts(ffn: int) -> dict[str, Any]:
    return {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": ffn,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _llama3(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {**scaling, "factor": factor, "original_max_position_embeddings": 8192},
    }


TIED = {"tie_word_embeddings": True}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-3B": _row("qwen2", 36, 2048, 16, 2, 11008, 151936, 32768, **TIED),
    "Qwen2.5-7B": _row("qwen2", 28, 3584, 28, 4, 18944, 152064, 131072),
    "Qwen2.5-72B": _row("qwen2", 80, 8192, 64, 8, 29568, 152064, 131072, rms_norm_eps=1e-5),
    "Qwen3-1.7B-Base": _row("qwen3", 28, 2048, 16, 8, 6144, 151936, 32768, **TIED),
    "Qwen3-4B-Base": _row("qwen3", 36, 2560, 32, 8, 9728, 151936, 32768, **TIED),
    "Qwen3-8B-Base": _row("qwen3", 36, 4096, 32, 8, 12288, 151936, 32768),
    "Qwen3-14B": _row("qwen3", 40, 5120, 40, 8, 17408, 151936, 40960),
    "Qwen3-32B": _row("qwen3", 64, 5120, 64, 8, 25600, 151936, 40960),
    "Qwen3-30B-A3B": _row("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, 40960, **_experts(768)),
    "Qwen3-235B-A22B": _row("qwen3_moe", 94, 4096, 64, 4, 12288, 151936, 40960, **_experts(1536)),
    "Llama-3.2-3B-Instruct": _row("llama", 28, 3072, 24, 8, 8192, 128256, 131072, **TIED, **_llama3(32.0)),
    "Llama-3.1-8B": _row("llama", 32, 4096, 32, 8, 14336, 128256, 131072, **_llama3(8.0)),
    "Llama-3.1-70B": _row("llama", 80, 8192, 64, 8, 28672, 128256, 131072, **_llama3(8.0)),
}


def published_architecture(name: str) -> Architecture:
    """Raises InputError for a model that the table does not have."""
    if name not in CONFIGS:
        raise InputError(f"the planner's table has no model {name!r}; it has: {', '.join(CONFIGS)}")
    return parse_architecture(CONFIGS[name], where=f"the planner's table, {name}")


def architecture_of(model: ModelSettings) -> Architecture:
    """From the model's own files if they are there, else from the table, by the last part of `model.hf_path`.

    Raises:
        InputError: neither has it.
    """
    if (model.hf_path / "config.json").exists():
        return read_architecture(model.hf_path)
    try:
        return published_architecture(model.hf_path.name)
    except InputError as e:
        raise InputError(f"model.hf_path: no config.json in {model.hf_path}, and {e}") from None
