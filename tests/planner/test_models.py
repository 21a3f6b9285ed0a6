"""The table of public models agrees with what their cards say, and training never reads it."""

from pathlib import Path

import pytest

from megatron_coreward.config.schema import ModelSettings
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.errors import InputError
from megatron_coreward.planner.models import CONFIGS, architecture_of, published_architecture
from megatron_coreward.planner.step_time import layer_weights, num_parameters

# Billions of parameters, all and without embeddings, as the model cards state them (Qwen2.5 technical report and Qwen3
# cards on the Hugging Face hub; Llama: "3.21B", "8.03B" and "70.6B"); active ones of the mixtures of experts.
CARDS = {
    "Qwen2.5-3B": (3.09, 2.77),
    "Qwen2.5-7B": (7.61, 6.53),
    "Qwen2.5-72B": (72.7, 70.0),
    "Qwen3-1.7B-Base": (1.7, 1.4),
    "Qwen3-4B-Base": (4.0, 3.6),
    "Qwen3-8B-Base": (8.2, 6.95),
    "Qwen3-14B": (14.8, 13.2),
    "Qwen3-32B": (32.8, 31.2),
    "Qwen3-30B-A3B": (30.5, 29.9),
    "Qwen3-235B-A22B": (235.0, 234.0),
    "Llama-3.2-3B-Instruct": (3.21, None),
    "Llama-3.1-8B": (8.03, None),
    "Llama-3.1-70B": (70.6, None),
}
ACTIVE = {"Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    arch = published_architecture(name)
    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)
    whole, without = CARDS[name]
    assert num_parameters(arch) / 1e9 == pytest.approx(whole, rel=0.015)
    if without is not None:
        assert (num_parameters(arch) - embeddings) / 1e9 == pytest.approx(without, rel=0.015)
    if name in ACTIVE:
        assert (arch.num_layers * layer_weights(arch) + embeddings) / 1e9 == pytest.approx(ACTIVE[name], rel=0.02)


def test_a_models_own_files_come_before_the_table(tmp_path: Path) -> None:
    path = tmp_path / "Qwen3-14B"
    write_model(path, byte_level_tokenizer(), layers=2)
    assert architecture_of(ModelSettings(hf_path=path)).num_layers == 2
    assert architecture_of(ModelSettings(hf_path=Path("models/Qwen3-14B"))).num_layers == 40


def test_an_unknown_model_is_named_with_what_the_table_has() -> None:
    with pytest.raises(InputError, match=r"no config.json in models/Qwen9.*Qwen2.5-3B"):
        architecture_of(ModelSettings(hf_path=Path("models/Qwen9")))
