"""What a Hugging Face `config.json` says of a model's shape: the numbers that layouts, memory and names follow from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_coreward.config.model_keys import ROPE, ROPE_NEUTRAL, Keys, check_keys
from megatron_coreward.errors import InputError

Family = Literal["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"]


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """What a family's modelling code fixes, and what a key means that is not there. One row is all that it needs here.

    The defaults are those of transformers 5.19 (`Qwen2Config`, `Qwen3Config`, `LlamaConfig`, `MistralConfig`,
    `Qwen3MoeConfig`).
    """

    qkv_bias: bool
    qk_norm: bool
    experts: bool
    kv_heads: int | None  # None: as many as heads
    kv_heads_nullable: bool  # null means as many as heads
    head_dim: int | None  # None: hidden_size / heads, which null means too
    slides: bool = False  # attention slides if the file does not say that it does not


FAMILIES: dict[str, FamilyRow] = {
    "qwen2": FamilyRow(True, False, False, 32, True, None),
    "qwen3": FamilyRow(False, True, False, 32, True, 128),
    "llama": FamilyRow(False, False, False, None, True, None),
    "mistral": FamilyRow(False, False, False, 8, True, None, slides=True),
    "qwen3_moe": FamilyRow(False, True, True, 4, False, None),
}

DEFAULT_ROPE_THETA = 10_000.0
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
        InputError: no such file, not JSON, a key is missing, wrong or twice there, or a family or feature that is not
            supported.
    """
    path = hf_path / "config.json"
    if not path.is_file():
        raise InputError(f"no config.json in {hf_path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object, found {type(config).__name__}")
    return parse_architecture(config, where=str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def parse_architecture(config: dict[str, Any], where: str) -> Architecture:
    """See `read_architecture`; `where` names the source in messages."""
    model_type: Any = config.get("model_type")
    if model_type not in tuple(FAMILIES):  # by equality: a list, which no dictionary can look up, is possible too
        raise InputError(f"{where}: model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    check_keys(config, model_type, where)
    row, keys = FAMILIES[model_type], Keys(config, where)
    if row.slides and "sliding_window" not in keys:
        raise InputError(
            f"{where}: sliding_window is missing, which means a window of 4096 tokens for model_type {model_type}; "
            "sliding-window attention is not supported; allowed: null"
        )
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    kv_heads = keys.whole("num_key_value_heads", row.kv_heads or heads, null=heads if row.kv_heads_nullable else None)
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_attention_heads is {heads}; allowed: a multiple of num_key_value_heads, {kv_heads}"
        )
    head_dim = keys.whole("head_dim", row.head_dim or hidden // heads, null=None if row.head_dim else hidden // heads)
    if not row.head_dim and config.get("head_dim") is None and hidden % heads:
        raise InputError(f"{where}: hidden_size is {hidden}; allowed without head_dim: a multiple of the {heads} heads")
    experts = None
    if row.experts:
        experts = Experts(
            num=keys.whole("num_experts" if config.get("num_experts") is not None else "num_local_experts"),
            top_k=keys.whole("num_experts_per_tok"),
            ffn_size=keys.whole("moe_intermediate_size"),
            normalise_top_k=keys.flag("norm_topk_prob"),
        )
        if experts.top_k > experts.num:
            raise keys.error("num_experts_per_tok", f"at most the {experts.num} experts")
    theta, scaling = _rope(keys, where)
    return Architecture(
        family=model_type,
        num_layers=keys.whole("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=keys.whole("intermediate_size"),
        vocab_size=keys.whole("vocab_size"),
        max_position=keys.whole("max_position_embeddings"),
        tied=keys.flag("tie_word_embeddings"),
        qkv_bias=row.qkv_bias,
        qk_norm=row.qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        experts=experts,
    )


def _rope(keys: Keys, where: str) -> tuple[float, RopeScaling | None]:
    """Transformers 5 writes `rope_parameters`; older files have `rope_theta` beside `rope_scaling`. All must agree."""
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    name = "rope_parameters" if new else "rope_scaling"
    for key, value in {**old, **new}.items():
        if isinstance(value, dict):
            raise InputError(f"{where}: {name} has values by layer type ({key}); supported: one set for all layers")
        if key in old and key in new and old[key] != new[key]:
            raise InputError(f"{where}: {key} is {old[key]!r} in rope_scaling and {value!r} in rope_parameters")
    rope = Keys({**old, **new}, where, within=name)
    kinds = {rope.get("rope_type"), rope.get("type")} - {None}
    if len(kinds) > 1:
        raise InputError(
            f"{where}: {name} has a rope_type of {rope.get('rope_type')!r} and a type of {rope.get('type')!r}"
        )
    kind = kinds.pop() if kinds else "default"
    if kind not in ("llama3", "default"):
        raise InputError(f"{where}: rope scaling of type {kind!r} is not supported; supported: llama3, default")
    rope.check(ROPE, ROPE_NEUTRAL)
    theta = rope.number("rope_theta", keys.number("rope_theta", DEFAULT_ROPE_THETA))
    if "rope_theta" in keys and keys.number("rope_theta") != theta:
        raise InputError(f"{where}: rope_theta is {keys.number('rope_theta'):g}, and {theta:g} in {name}")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.whole("original_max_position_embeddings"),
    )
