"""The keys of a `config.json`: those that are read, those that change nothing, and those that must have one value.

A model computes what its config says, and readers pick the keys that they know: transformers 5.19 and vLLM 0.32 each
know some that the other does not. So every key is in one of three groups here, and one that is in none, and says
something, is refused by its name: nobody knows whether the actor would compute what the engine does.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_coreward.errors import InputError

# What `config.architecture` reads into an `Architecture`.
READ = frozenset(
    {
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "num_experts",
        "num_local_experts",  # transformers' other name of num_experts
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
    }
)

# What says who wrote a file, how it was trained, how it is sampled from or how fast it runs: the weights mean the same.
NO_EFFECT = frozenset(
    {
        "attention_dropout",  # nothing is dropped here
        "auto_map",  # code beside the weights, which is never run (`preflight` refuses it before a run)
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_sequence_length",
        "max_window_layers",  # of sliding windows, which must be off
        "model_max_length",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention",
        "use_flash_attn",
        # Of generation, which older files have here.
        "bad_words_ids",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "repetition_penalty",
        "return_dict_in_generate",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
_NO_EFFECT_ENDINGS = ("_token_id", "_token_ids", "_version")
_NO_EFFECT_BEGINNINGS = ("_", "tokenizer_", "unsloth_")

# Keys that change what the model computes unless they have this value (or are null, or not there).
NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "dual_chunk_attention_config": None,  # read by vLLM alone
    "hidden_act": "silu",
    "is_causal": True,  # read by vLLM alone
    "is_encoder_decoder": False,
    "logit_scale": 1.0,  # read by vLLM alone
    "mlp_bias": False,
    "mlp_only_layers": [],
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "qkv_bias": False,  # read by vLLM alone, of Llama models
    "quantization_config": None,
    "sliding_window": None,
    "use_sliding_window": False,
}
# By family, what a key means otherwise. The bias of Qwen2 is fixed, and its window counts if it is used.
_OF_FAMILY: dict[str, frozenset[str]] = {
    "qwen2": frozenset({"attention_bias", "qkv_bias", "sliding_window"}),
    "qwen3": frozenset({"sliding_window"}),
    "qwen3_moe": frozenset({"sliding_window"}),
}
# Of `rope_scaling` and `rope_parameters`.
ROPE = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
)
ROPE_NEUTRAL: dict[str, Any] = {"partial_rotary_factor": 1.0}

# Classes that compute what the family's causal language model does; vLLM takes the class that the file names.
CLASSES = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
}
_SHOWN = 60  # characters of a value in a message


def shown(value: Any) -> str:
    """A value in a message, cut if it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class Keys:
    """One object of a config, read key by key; every error names the key, what was found and what is allowed."""

    def __init__(self, values: Mapping[str, Any], where: str, within: str = "") -> None:
        """Args:
        within: the key that the object is the value of, for messages.
        """
        self._values, self._where, self._within = values, where, f"{within}." if within else ""

    def error(self, key: str, allowed: str) -> InputError:
        found = shown(self._values.get(key))
        return InputError(f"{self._where}: {self._within}{key} is {found}; allowed: {allowed}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def whole(self, key: str, default: int | None = None, *, null: int | None = None) -> int:
        """A whole number of at least 1.

        Args:
            default: what it is if the key is not there; None: an error.
            null: what null means; None: an error.
        """
        value = self._value(key, default)
        if value is None:
            if null is not None:
                return null
            if default is None:
                raise InputError(f"{self._where}: key {self._within + key!r} is missing (it is null)")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; `default` (None: an error) if the key is not there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false if the key is not there."""
        value = self._values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, "true, false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty if there is none, or null."""
        value = self._values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "an object, or null")
        return value

    def check(self, read: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Raises InputError if there is more than what is read and what has its neutral value."""
        for key, value in self._values.items():
            if key in neutral and not _says_nothing(value, neutral[key]):
                raise self.error(key, _json(neutral[key]))
            if key not in neutral and key not in read and value:
                raise self.error(key, f"not to be there; known: {', '.join(sorted(read))}")

    def _value(self, key: str, default: Any) -> Any:
        if key not in self._values and default is None:
            raise InputError(f"{self._where}: key {self._within + key!r} is missing")
        return self._values.get(key, default)


def check_keys(config: Mapping[str, Any], family: str, where: str) -> None:
    """Makes sure that nothing in a config changes the model but what is read.

    Raises:
        InputError: every key that does, one a line.
    """
    problems = list(_problems(config, family))
    if problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))


def _problems(config: Mapping[str, Any], family: str) -> Iterator[str]:
    for key, value in config.items():
        if key in READ or _has_no_effect(key) or key in _OF_FAMILY.get(family, ()):
            continue
        if key == "architectures":
            yield from _class_problems(value, family)
        elif key == "layer_types":
            yield from _layer_problems(value)
        elif key in NEUTRAL:
            if not _says_nothing(value, NEUTRAL[key]):
                sliding = "sliding-window attention is not supported; allowed" if "sliding" in key else "supported"
                yield f"{key} is {shown(value)}; {sliding}: {_json(NEUTRAL[key])}"
        elif value:  # null, false, 0 and nothing in it say nothing
            yield (
                f"{key} is {shown(value)}, a key that is not known: it may change what the model computes; remove it "
                "if it does not"
            )


def _has_no_effect(key: str) -> bool:
    return key in NO_EFFECT or key.endswith(_NO_EFFECT_ENDINGS) or key.startswith(_NO_EFFECT_BEGINNINGS)


def _class_problems(value: Any, family: str) -> Iterator[str]:
    known = CLASSES[family]
    if value and (not isinstance(value, list) or not set(map(str, value)) <= set(known)):
        yield f"architectures is {shown(value)}; supported for model_type {family}: {known[0]}"


def _layer_problems(value: Any) -> Iterator[str]:
    if value is None:
        return
    kinds = value if isinstance(value, list) else [value]
    other = [kind for kind in kinds if kind != "full_attention" or kinds is not value]
    if other:
        yield (
            f"layer_types has {shown(other[0])}; sliding-window and other attention is not supported; allowed: "
            "full_attention for all layers"
        )


def _says_nothing(value: Any, neutral: Any) -> bool:
    return value is None or (bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool))


def _json(value: Any) -> str:
    return json.dumps(value).strip('"')
