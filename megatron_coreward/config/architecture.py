"""What a Hugging Face `config.json` says of a model's shape: the numbers that layouts, memory and names follow from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_coreward.errors import InputError

Family = Literal["qwen2", "qwen3", "llama", "qwen3_moe"]

# model_type -> (QKV has a bias, QK-norm, mixture of experts). One row is all that a dense family needs here.
FAMILIES: dict[str, tuple[bool, bool, bool]] = {
    "qwen2": (True, False, False),
    "qwen3": (False, True, False),
    "llama": (False, False, False),
    "qwen3_moe": (False, True, True),
}

VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times the tensor-parallel size


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's frequency scaling; any other kind is refused."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture-of-experts shape of every layer."""

    num: int
    top_k: int
    ffn_size: int
    normalise_top_k: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    family: Family
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_position: int
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    experts: Experts | None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Embedding rows under a tensor-parallel size, padded as Megatron pads them; the padding is zero."""
        multiple = VOCAB_MULTIPLE * tensor_parallel
        return (self.vocab_size + multiple - 1) // multiple * multiple


def read_architecture(hf_path: Path) -> Architecture:
    """Reads `config.json` in a model directory.

    Raises:
        InputError: no such file, not JSON, a key is missing, or a family or feature that is not supported.
    """
    path = hf_path / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {hf_path}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object, found {type(config).__name__}")
    return parse_architecture(config, where=str(path))


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """See `read_architecture`; `where` names the source in messages."""
    model_type: Any = config.get("model_type")
    if model_type not in tuple(FAMILIES):  # by equality: a list, which no dictionary can look up, is possible too
        raise InputError(f"{where}: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    qkv_bias, qk_norm, is_moe = FAMILIES[model_type]

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if value is None:
            raise InputError(f"{where}: key {key!r} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {key} is {value!r}; allowed: a whole number of at least 1")
        return value

    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}; supported: silu")
    if model_type == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        raise InputError(f"{where}: attention_bias and mlp_bias of Llama models are not supported")
    if model_type in ("qwen3", "qwen3_moe") and config.get("attention_bias"):
        raise InputError(f"{where}: attention_bias of Qwen3 models is not supported")
    if config.get("use_sliding_window"):
        raise InputError(f"{where}: use_sliding_window is true; sliding-window attention is not supported")
    heads = size("num_attention_heads")
    experts = None
    if is_moe:
        if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
            raise InputError(f"{where}: decoder_sparse_step != 1 and mlp_only_layers are not supported")
        experts = Experts(
            num=size("num_experts" if config.get("num_experts") is not None else "num_local_experts"),
            top_k=size("num_experts_per_tok"),
            ffn_size=size("moe_intermediate_size"),
            normalise_top_k=bool(config.get("norm_topk_prob", False)),
        )
    # transformers 5 writes rope_parameters; older files have rope_theta beside rope_scaling.
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return Architecture(
        family=model_type,
        num_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", size("hidden_size") // heads),
        ffn_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        max_position=size("max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        rope_scaling=_rope_scaling(rope, where),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        experts=experts,
    )


def _rope_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{where}: rope scaling of type {kind!r} is not supported; supported: llama3")
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{where}: rope scaling of type llama3 is incomplete ({type(e).__name__}: {e})") from None
