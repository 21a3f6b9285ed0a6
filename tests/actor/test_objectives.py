"""Every objective of the loss is the same under every layout and cut into micro-batches: that of plain transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_coreward.config.schema import LossSettings
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.types import TrainBatch
from tests.actor.loss_on_ranks import loss_and_gradients
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch, split_experts

# Mean log ratios of the sequences, some of which are beyond the bounds of gspo; and a bonus on the entropy that is as
# large as the rest.
MEAN_LOG_RATIOS = (0.02, -0.02, 0.2, -0.2, 0.03, 0.1, -0.1, 0.0)
LOSSES = [
    LossSettings(kl_coef=0.1, objective="gspo", clip_low=0.05, clip_high=0.06),
    LossSettings(kl_coef=0.1, objective="cispo", clip_low=0.1, clip_high=0.2),
    LossSettings(kl_coef=0.1, objective="ppo", entropy_coef=0.5),
    LossSettings(kl_coef=0.1, objective="gspo", entropy_coef=0.1),
]
ONE = [{}, {"tokens_per_microbatch": 64}]
TWO: list[dict[str, Any]] = [
    {"tensor_parallel": 2},
    {"pipeline_parallel": 2},
    {"data_parallel": 2},
    {"context_parallel": 2},
    {"context_parallel": 2, "tokens_per_microbatch": 64},
]
FOUR: list[dict[str, Any]] = [
    {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    {"pipeline_parallel": 2, "context_parallel": 2},
]


def batch_near(path: Path) -> TrainBatch:
    """A batch whose old log-probs are around those of the model, so that ratios are as in training."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    batch, rng = make_batch(259), np.random.default_rng(1)
    old = []
    for s, ids in enumerate(batch.sequences.token_ids):
        tokens, prompt = torch.from_numpy(ids).long(), int(batch.sequences.prompt_lengths[s])
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, tokens[prompt:, None])[:, 0].numpy()
        noise = rng.normal(0.0, 0.3, len(chosen))
        old.append((chosen - MEAN_LOG_RATIOS[s] + noise - noise.mean()).astype(np.float32))
    return dataclasses.replace(batch, old_logprobs=old)


def by_hand(path: Path, batch: TrainBatch, loss: LossSettings) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients from transformers and the formulas, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    clipped = 0
    for s, ids in enumerate(batch.sequences.token_ids):
        tokens, prompt = torch.from_numpy(ids).long(), int(batch.sequences.prompt_lengths[s])
        logp = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        chosen = logp.gather(1, tokens[prompt:, None])[:, 0]
        assert batch.old_logprobs is not None
        assert batch.reference_logprobs is not None
        gap, advantage = chosen - torch.from_numpy(batch.old_logprobs[s]), float(batch.advantages[s])
        if loss.objective == "gspo":
            ratio = gap.mean().exp().expand(len(gap))
            policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        elif loss.objective == "cispo":
            policy = -gap.exp().clamp(low, high).detach() * advantage * chosen
        else:
            policy = torch.maximum(-advantage * gap.exp(), -advantage * gap.exp().clamp(low, high))
        clipped += int((gap.mean().exp() < low) | (gap.mean().exp() > high))
        d = torch.from_numpy(batch.reference_logprobs[s]) - chosen
        entropy = -(logp.exp() * logp).sum(-1)
        token = policy + batch.kl_coef * (d.exp() - d - 1) - loss.entropy_coef * entropy
        total = total + float(batch.token_weights[s]) * token.sum()
    if loss.objective == "gspo" and not loss.entropy_coef:
        assert 0 < clipped < len(batch)
    total.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return float(total.detach()), split_experts(gradients)


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "layouts"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_objectives_agree_with_transformers_under_every_cut(
    tmp_path: Path, ranks: int, layouts: list[dict[str, Any]]
) -> None:
    write_model(tmp_path, byte_level_tokenizer(), family="qwen3", hidden=64, ffn=96, head_dim=24)
    batch = batch_near(tmp_path)
    results = run_ranks(ranks, loss_and_gradients, tmp_path, LOSSES, layouts, [free_port() for _ in layouts], batch)
    for number, settings in enumerate(LOSSES):
        loss, gradients = by_hand(tmp_path, batch, settings)
        for place, layout in enumerate(layouts):
            what = f"{settings.objective} with entropy_coef {settings.entropy_coef} under {layout}"
            of_ranks = [result[place][number] for result in results]
            assert sum(part for part, _ in of_ranks if part is not None) == pytest.approx(loss, rel=1e-5), what
            for name, want in gradients.items():
                got = np.full(tuple(want.shape), np.nan, dtype=np.float32)
                for _, pieces in of_ranks:
                    for index, piece in pieces.get(name, []):
                        got[index] = piece
                error = np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy())
                assert error < 2e-5, f"{what}: gradient of {name} is off by {error:.1e}"
