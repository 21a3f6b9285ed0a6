"""Small models with random weights, written as Hugging Face directories: the demo's policy, and what tests run on.

Everything about the files is as in a published checkpoint of the family (names, dtypes, config, generation config,
tokenizer), only small and made from a seed.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as hf_logging

from megatron_coreward.errors import InputError

Family = Literal["qwen2", "qwen3", "llama", "mistral", "qwen3_moe"]

_CLASSES: dict[Family, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}

# Llama 3.1's scaling of the rotary frequencies, but with a pre-training context of 64 tokens instead of 8,192, so that
# a short text is already beyond it.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


# Longer than 60 lines: twenty sizes and what they mean come first, the work is short.
def write_model(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    family: Family = "qwen3",
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 384,
    experts: int = 4,
    experts_per_token: int = 2,
    tie: bool = False,
    llama3_rope: bool = False,
    rope_theta: float = 10_000.0,
    max_positions: int = 4096,
    pad_vocab_to: int = 64,
    init_std: float = 0.06,
    jitter: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes config.json, the weights, generation_config.json and the tokenizer's files; returns the directory.

    Args:
        layers, hidden, heads, kv_heads, ffn: sizes; `ffn` is that of each expert in `qwen3_moe`.
        head_dim: width of a head; None: hidden / heads.
        experts, experts_per_token: of every layer, `qwen3_moe` only.
        tie: the output layer is the embedding (its tensor is then not in the files).
        llama3_rope: Llama 3.1's frequency scaling (`LLAMA3_ROPE`), `llama` only.
        pad_vocab_to: the vocabulary is the tokenizer's, rounded up to a multiple of this.
        init_std: standard deviation of the weight matrices. The usual 0.02 is for wide models: at 128 units it gives
            next to uniform distributions, and the demo's task takes twice as many steps to learn.
        jitter: standard deviation of noise on every parameter. Fresh norms are all ones and fresh biases all zeros, so
            a test that moves weights about sees a mix-up between them only if this is not 0.
        seed: of the weights; the caller's torch generator is left as it was.
        max_shard_size: as transformers has it; a small one ("100KB") gives an index and several files.

    Raises InputError for sizes that do not fit together, and for a tokenizer that the family does not load as it is.
    """
    _check(family, hidden, heads, kv_heads, head_dim, experts, experts_per_token, llama3_rope)
    config_class, model_class = _CLASSES[family]
    settings: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // pad_vocab_to) * pad_vocab_to,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_theta": rope_theta, **(LLAMA3_ROPE if llama3_rope else {"rope_type": "default"})},
        "tie_word_embeddings": tie,
        "initializer_range": init_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family != "qwen2":  # Qwen2 has no such setting
        settings["head_dim"] = hidden // heads if head_dim is None else head_dim
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "qwen3_moe":
        settings |= {"num_experts": experts, "num_experts_per_tok": experts_per_token, "norm_topk_prob": True}
        settings |= {"moe_intermediate_size": ffn, "decoder_sparse_step": 1, "mlp_only_layers": []}

    model = _random_model(model_class, config_class(**settings), seed, jitter)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    with _without_progress_bars():  # a model of a few megabytes is written at once
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    for file in directory.glob("*.safetensors"):  # which safetensors 0.8 writes for the owner alone
        file.chmod((directory / "config.json").stat().st_mode)
    tokenizer.save_pretrained(directory)
    _check_tokenizer(directory, tokenizer)
    return directory


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _random_model(model_class: Any, config: Any, seed: int, jitter: float) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        if jitter:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=jitter)
    return model


def _check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The directory gives the tokenizer back that was saved to it.

    transformers 5 loads some families (qwen2) with their own class, which keeps the vocabulary of the files but not how
    text is cut: a word-level tokenizer would then drop words in silence.
    """
    text = tokenizer.decode(range(len(tokenizer)))
    loaded = AutoTokenizer.from_pretrained(directory)
    if loaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise InputError(
            f"tokenizer: transformers loads the one in {directory} as {type(loaded).__name__}, which cuts text in "
            "another way; allowed for this family: a byte-level tokenizer"
        )


def _check(
    family: str,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    experts: int,
    experts_per_token: int,
    llama3_rope: bool,
) -> None:
    if family not in get_args(Family):
        raise InputError(f"family: found {family!r}; allowed: {', '.join(get_args(Family))}")
    if heads % kv_heads:
        raise InputError(f"kv_heads: found {kv_heads}; allowed: a divisor of heads={heads}")
    if head_dim is None and hidden % heads:
        raise InputError(f"heads: found {heads}; allowed: a divisor of hidden={hidden}, unless head_dim is given")
    if head_dim is not None and family == "qwen2" and head_dim * heads != hidden:
        raise InputError(f"head_dim: found {head_dim}; allowed for qwen2: hidden / heads = {hidden / heads:g}")
    if family == "qwen3_moe" and experts_per_token > experts:
        raise InputError(f"experts_per_token: found {experts_per_token}; allowed: at most experts={experts}")
    if llama3_rope and family != "llama":
        raise InputError(f"llama3_rope: found true for {family}; allowed: llama only")
