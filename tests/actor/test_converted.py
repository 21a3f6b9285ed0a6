"""Converted checkpoints in actors, and actors' checkpoints converted, for every family and layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_coreward.checkpoint.convert import to_hf, to_megatron
from megatron_coreward.checkpoint.verify import open_checkpoint, verify
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor.on_ranks import stats_of_converted, train_and_save
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch
from tests.checkpoint.models import assert_bit_equal, read_hf

pytestmark = pytest.mark.ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"family": "qwen2", "tie": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "qwen3, tied": {"family": "qwen3", "tie": True, "kv_heads": 4},
    "llama with rope scaling": {"family": "llama", "llama3_rope": True},
    "llama with rope scaling, tied": {"family": "llama", "llama3_rope": True, "tie": True},
    "mistral": {"family": "mistral"},
    "qwen3_moe": {"family": "qwen3_moe"},
}
ONE: list[dict[str, Any]] = [{}]
TWO = [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"pipeline_parallel": 2, "virtual_pipeline": 2}]
EXPERTS = {"data_parallel": 2, "expert_parallel": 2}
FOUR = [{"tensor_parallel": 2, "pipeline_parallel": 2}]
SEQUENCE = {"sequence_parallel": True}  # which Megatron wants where experts meet tensor parallelism
WHOLE = {"expert_tensor_parallel": 1, "expert_parallel": 2}
TWO_EXPERTS = [TWO[0] | SEQUENCE, TWO[0] | SEQUENCE | WHOLE, *TWO[1:], EXPERTS]
FOUR_EXPERTS = [FOUR[0] | SEQUENCE, {"pipeline_parallel": 2} | EXPERTS]


def cases() -> list[Any]:
    """One case is quick enough for every run of the tests: experts on two ranks."""
    found = []
    for family in FAMILIES:
        experts = family == "qwen3_moe"
        two, four = (TWO_EXPERTS, FOUR_EXPERTS) if experts else (TWO, FOUR)
        for ranks, layouts in ((1, ONE), (2, two), (4, four)):
            marks = [] if experts and ranks == 2 else [pytest.mark.slow]
            found.append(pytest.param(family, ranks, layouts, id=f"{family}, {ranks} ranks", marks=marks))
    return found


def model(folder: Path, family: str) -> Path:
    """With noise on every parameter: a norm of all ones in a wrong place would not be seen."""
    settings = {"hidden": 64, "ffn": 96, "jitter": 0.05, "pad_vocab_to": 1} | FAMILIES[family]
    return write_model(folder / "source", byte_level_tokenizer(), max_shard_size="200KB", **settings)


def transformers_stats(path: Path, sequences: Any) -> dict[int, tuple[np.ndarray[Any, Any], ...]]:
    """Log-probs, entropy and self-certainty, which between them depend on every logit."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    found = {}
    for row, ids in enumerate(sequences.token_ids):
        tokens, prompt = torch.from_numpy(ids).long(), int(sequences.prompt_lengths[row])
        with torch.no_grad():
            logp = network(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, tokens[prompt:, None])[:, 0]
        found[row] = tuple(
            x.numpy() for x in (chosen, -(logp.exp() * logp).sum(-1), (-logp - np.log(logp.shape[1])).mean(-1))
        )
    return found


@pytest.mark.parametrize(("family", "ranks", "layouts"), cases())
def test_a_converted_checkpoint_gives_transformers_numbers(
    tmp_path: Path, family: str, ranks: int, layouts: list[dict[str, Any]]
) -> None:
    """And Megatron's own reader puts the same bits into the same parameters."""
    source, sequences = model(tmp_path, family), make_batch(259).sequences
    to_megatron(source, tmp_path / "m")
    expected = transformers_stats(source, sequences)
    ports = [free_port() for _ in layouts]
    results = run_ranks(ranks, stats_of_converted, tmp_path / "m", layouts, ports, sequences)
    for place, layout in enumerate(layouts):
        seen, worst = set(), 0.0
        for rows, stats, unlike in (result[place] for result in results):
            assert unlike == [], layout
            if stats is None:
                continue
            for i, row in enumerate(rows):
                found = (stats.logprobs[i], stats.entropy[i], stats.self_certainty[i])
                for ours, theirs in zip(found, expected[row], strict=True):
                    worst = max(worst, float(np.abs(ours - theirs).max()))
                seen.add(row)
        assert seen == set(range(len(sequences))), layout
        assert worst < 1e-4, layout
        print(f"{family}, {layout}: {worst:.1e}")


@pytest.mark.parametrize(
    ("family", "ranks", "layout"),
    [
        ("qwen2, tied", 2, {"tensor_parallel": 2}),
        pytest.param("qwen3", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, marks=pytest.mark.slow),
        pytest.param("qwen2, tied", 2, {"pipeline_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, EXPERTS, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, {"pipeline_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3", 4, {"tensor_parallel": 2, "data_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("llama with rope scaling", 4, FOUR[0], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_checkpoint_of_a_run_converts_to_what_the_actor_exports(
    tmp_path: Path, family: str, ranks: int, layout: dict[str, Any]
) -> None:
    source = model(tmp_path, family)
    (tmp_path / "state").mkdir()
    run_ranks(ranks, train_and_save, source, layout, free_port(), make_batch(259), tmp_path)
    exported = {"policy": read_hf(tmp_path / "hf"), "teacher": read_hf(tmp_path / "hf_teacher")}
    assert any(not torch.equal(exported["policy"][name], exported["teacher"][name]) for name in exported["policy"])
    for weights, folder in (("policy", "hf"), ("teacher", "hf_teacher")):
        to_hf(tmp_path / "state", tmp_path / weights, hf_path=source, weights=weights, shard_bytes=100_000)
        assert_bit_equal(read_hf(tmp_path / weights), exported[weights])
        of_run = open_checkpoint(tmp_path / "state", source, weights)
        assert verify(of_run, open_checkpoint(tmp_path / folder)).ok
