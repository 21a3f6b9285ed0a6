"""Small architectures for tests of mapping, layouts and plans: 8 heads of 6, a vocabulary that padding has to fill."""

from typing import Any

from megatron_coreward.config.architecture import Architecture, Experts

EXPERTS = Experts(num=4, top_k=2, ffn_size=8, normalise_top_k=True)


def architecture(**changes: Any) -> Architecture:
    """Fewer key/value heads than the largest tensor-parallel size; `changes` are fields of `Architecture`."""
    shape: dict[str, Any] = {
        "family": "qwen3",
        "num_layers": 4,
        "hidden_size": 24,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 6,
        "ffn_size": 16,
        "vocab_size": 131,
        "max_position": 64,
        "tied": False,
        "qkv_bias": False,
        "qk_norm": True,
        "rope_theta": 1e4,
        "rope_scaling": None,
        "norm_eps": 1e-6,
        "experts": None,
    }
    return Architecture(**(shape | changes))
