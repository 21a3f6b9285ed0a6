"""Every layout computes the loss, statistics and gradients that plain transformers and autograd compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_coreward.actor.token_stats import CHUNK_ELEMENTS
from megatron_coreward.algorithms.aggregation import token_weights
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.types import Sequences, TrainBatch
from tests.actor.on_ranks import gradients_and_stats
from tests.actor.ranks import free_port, run_ranks

pytestmark = pytest.mark.ranks

CLIP, KL_COEF = 0.2, 0.1

ONE = [{}, {"tokens_per_microbatch": 64}, {"tokens_per_microbatch": 4096}]
TWO = [
    {"tensor_parallel": 2},
    {"tensor_parallel": 2, "sequence_parallel": True},
    {"pipeline_parallel": 2},
    {"pipeline_parallel": 2, "virtual_pipeline": 2},
    {"pipeline_parallel": 2, "first_stage_layers": 3, "last_stage_layers": 1},
    {"data_parallel": 2},
    {"tensor_parallel": 2, "recompute": "full"},
    {"tensor_parallel": 2, "recompute": "selective"},
    {"context_parallel": 2},
    {"context_parallel": 2, "tokens_per_microbatch": 64},
]
FOUR = [
    {"tensor_parallel": 2, "pipeline_parallel": 2},
    {"tensor_parallel": 2, "data_parallel": 2},
    {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    {"pipeline_parallel": 2, "context_parallel": 2},
    {"data_parallel": 2, "context_parallel": 2},
    {"pipeline_parallel": 2, "virtual_pipeline": 2, "data_parallel": 2},
    {"pipeline_parallel": 4},
]


def make_batch(vocab_size: int, times: int = 1) -> TrainBatch:
    """Eight sequences, or `times` as many, with everything that a loss can read; old log-probs far enough away that
    some ratios clip."""
    rng = np.random.default_rng(0)
    prompts = np.asarray([5, 6, 7, 4, 8, 9, 10, 11] * times, dtype=np.int32)
    lengths = [20, 33, 47, 12, 60, 31, 25, 40] * times
    ids = [rng.integers(1, vocab_size, n).astype(np.int32) for n in lengths]
    responses = [n - p for n, p in zip(lengths, prompts, strict=True)]

    def around(centre: float) -> list[Any]:
        return [rng.normal(centre, 0.3, n).astype(np.float32) for n in responses]

    return TrainBatch(
        sequences=Sequences(ids, prompts),
        advantages=rng.normal(size=len(ids)).astype(np.float32),
        token_weights=token_weights(responses, "seq-mean-token-mean", 64),
        rollout_logprobs=around(-5.5),
        old_logprobs=around(-5.5),
        reference_logprobs=around(-5.5),
        kl_coef=KL_COEF,
    )


def plain(model: Any, tokens: torch.Tensor, sequence: int) -> torch.Tensor:
    """[T, V] logits of a sequence."""
    logits: torch.Tensor = model(tokens[None]).logits[0]
    return logits


def by_hand(
    path: Path, batch: TrainBatch, forward: Callable[..., torch.Tensor] = plain
) -> tuple[dict[int, Any], dict[str, torch.Tensor], float]:
    """Statistics, gradients and loss from transformers and the formulas, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    stats, total = {}, torch.zeros(())
    for s, ids in enumerate(batch.sequences.token_ids):
        tokens, prompt = torch.from_numpy(ids).long(), int(batch.sequences.prompt_lengths[s])
        logp = forward(model, tokens, s)[prompt - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, tokens[prompt:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        certainty = (-logp - np.log(logp.shape[1])).mean(-1)
        stats[s] = tuple(x.detach().numpy() for x in (chosen, entropy, certainty))
        assert batch.old_logprobs is not None
        assert batch.reference_logprobs is not None
        ratio = (chosen - torch.from_numpy(batch.old_logprobs[s])).exp()
        advantage = float(batch.advantages[s])
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
        d = torch.from_numpy(batch.reference_logprobs[s]) - chosen
        total = total + float(batch.token_weights[s]) * (policy + KL_COEF * (d.exp() - d - 1)).sum()
    total.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return stats, split_experts(gradients), float(total.detach())


def split_experts(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds the experts of a layer in two fused tensors; a checkpoint has three for each expert."""
    found = {}
    for name, value in gradients.items():
        prefix, fused, which = name.rpartition(".mlp.experts.")
        if not fused:
            found[name] = value
            continue
        for expert, of_expert in enumerate(value):
            parts = (
                dict(zip(("gate", "up"), of_expert.chunk(2), strict=True))
                if which == "gate_up_proj"
                else {"down": of_expert}
            )
            found |= {f"{prefix}.mlp.experts.{expert}.{part}_proj.weight": piece for part, piece in parts.items()}
    return found


def check(
    path: Path,
    batch: TrainBatch,
    layouts: list[dict[str, Any]],
    ranks: int,
    tolerance: float = 1e-5,  # nats
    forward: Callable[..., torch.Tensor] = plain,
) -> None:
    expected, gradients, loss = by_hand(path, batch, forward)
    results = run_ranks(ranks, gradients_and_stats, path, layouts, [free_port() for _ in layouts], batch)
    for place, layout in enumerate(layouts):
        of_ranks = [result[place] for result in results]
        found = [r["stats"] for r in of_ranks if r["stats"] is not None]
        seen = set()
        for rows, stats in found:
            for i, row in enumerate(rows):
                for values, want in zip(
                    (stats.logprobs[i], stats.entropy[i], stats.self_certainty[i]), expected[row], strict=True
                ):
                    np.testing.assert_allclose(values, want, atol=tolerance, err_msg=f"{layout}, sequence {row}")
                seen.add(row)
        assert seen == set(range(len(batch))), layout
        assert sum(r["loss"] for r in of_ranks if r["loss"] is not None) == pytest.approx(loss, rel=1e-5), layout
        norm = np.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients.values()))
        assert of_ranks[0]["norm"] == pytest.approx(norm, rel=1e-5), layout
        for name, want in gradients.items():
            got = np.full(tuple(want.shape), np.nan, dtype=np.float32)
            for r in of_ranks:
                for index, piece in r["gradients"].get(name, []):
                    got[index] = piece
            error = np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy())
            assert error < 1e-5, f"{layout}: gradient of {name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    write_model(path, byte_level_tokenizer(), family="qwen3", hidden=64, ffn=96, head_dim=24)
    return path


@pytest.mark.parametrize(("ranks", "layouts"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_layouts_and_microbatches_agree_with_transformers(
    qwen3: Path, ranks: int, layouts: list[dict[str, Any]]
) -> None:
    check(qwen3, make_batch(259), layouts, ranks)


def test_a_vocabulary_of_real_size_agrees_with_transformers(tmp_path: Path) -> None:
    """151,936 tokens, of which the second rank has fewer, and more response tokens than are scored at once."""
    write_model(tmp_path, byte_level_tokenizer(), hidden=32, layers=2, ffn=48, head_dim=16, pad_vocab_to=151_936)
    batch = make_batch(151_936, times=2)
    responses = sum(len(ids) for ids in batch.sequences.token_ids) - int(batch.sequences.prompt_lengths.sum())
    assert responses > CHUNK_ELEMENTS["cpu"] // (151_936 // 2)
    check(tmp_path, batch, [{"tensor_parallel": 2, "tokens_per_microbatch": 4096}], 2, tolerance=3e-5)  # of 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        {"family": "qwen2", "tie": True},
        {"family": "llama", "llama3_rope": True},
        {"family": "llama", "tie": True, "kv_heads": 1},
        {"family": "qwen3", "tie": True, "kv_heads": 4},
        {"family": "mistral", "head_dim": 24},
    ],
    ids=lambda model: "-".join(f"{k}={v}" for k, v in model.items()),
)
def test_families_agree_with_transformers(tmp_path: Path, model: dict[str, Any]) -> None:
    write_model(tmp_path, byte_level_tokenizer(), hidden=64, ffn=96, **model)
    check(tmp_path, make_batch(259), [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], 2)


SP2 = {"tensor_parallel": 2, "sequence_parallel": True}
EXPERTS_ON_TWO = [
    {"data_parallel": 2},
    {"data_parallel": 2, "expert_parallel": 2},
    {"pipeline_parallel": 2},
    {"context_parallel": 2},
    SP2,
    {**SP2, "expert_tensor_parallel": 1},  # whole experts on both ranks, each with half of the tokens
    {**SP2, "expert_tensor_parallel": 1, "expert_parallel": 2},
    {"context_parallel": 2, "expert_parallel": 2},
    {"data_parallel": 2, "expert_tensor_parallel": 2},
]
EXPERTS_ON_FOUR = [
    {**SP2, "data_parallel": 2, "expert_parallel": 2},
    {**SP2, "data_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
    {**SP2, "data_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1},
    {**SP2, "context_parallel": 2, "expert_parallel": 4, "expert_tensor_parallel": 1},
    {**SP2, "pipeline_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts"), [(2, EXPERTS_ON_TWO), (4, EXPERTS_ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_experts_agree_with_transformers(tmp_path: Path, ranks: int, layouts: list[dict[str, Any]]) -> None:
    """Log-probs, loss, norm, and the gradient of every expert: also where experts are cut over other ranks than the
    rest of a layer."""
    write_model(tmp_path, byte_level_tokenizer(), family="qwen3_moe", hidden=64, ffn=96)
    check(tmp_path, make_batch(259), layouts, ranks)
