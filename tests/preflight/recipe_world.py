"""A recipe with everything that it names, in which nothing is wrong: written in milliseconds, without torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_coreward.config.architecture import parse_architecture
from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.weights.mapping import hf_tensors

MODEL = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = 8


def write_model(folder: Path, changes: dict[str, Any]) -> None:
    """A model directory of a few kilobytes, without torch."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MODEL | changes
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_tensors(parse_architecture(config, "test"))
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def rows(texts: Sequence[str], ground_truth: str | None = "1", first: int = 0) -> list[Row]:
    return [Row((Message(role="user", content=t),), ground_truth, "set", first + i) for i, t in enumerate(texts)]


def write_world(folder: Path) -> None:
    """A recipe with everything that it names, in which nothing is wrong."""
    write_model(folder / "model", {})
    write_model(folder / "experts", EXPERTS)
    texts = [f"What is {i} plus {i}?" for i in range(QUESTIONS)]
    for name in ("train", "rephrased", "val"):
        write_rows(folder / f"{name}.parquet", rows([f"{name}: {t}" for t in texts]), split="train")
    recipe = {
        "run_dir": "run",
        "steps": 10,
        "method": "co_rewarding_i",
        "model": {"hf_path": "model"},
        "data": {
            "train_files": ["train.parquet"],
            "rephrased_files": ["rephrased.parquet"],
            "val_files": ["val.parquet"],
            "batch_size": 4,
        },
        "rollout": {"max_response_tokens": 1024},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
