"""Token statistics against their definitions on a whole, uncut vocabulary."""

import pytest
import torch

from megatron_coreward.actor import token_stats
from megatron_coreward.actor.token_stats import VocabularyShard, score_tokens
from tests.actor.ranks import free_port, run_ranks
from tests.actor.scores_on_ranks import scores_of_many_chunks

T, V, PADDING = 12, 19, 5


@pytest.fixture(params=[1 << 24, 3 * V], ids=["one chunk", "many chunks"])
def _chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stats, "CHUNK_ELEMENTS", request.param)


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(T, V + PADDING, generator=generator)).to(dtype).requires_grad_()


PREDICTS = torch.tensor([0, 1, 4, 5, 6, 11])
TARGETS = torch.tensor([3, 18, 0, 7, 7, 1])
WHOLE = VocabularyShard(0, V, V, None)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_definitions(temperature: float) -> None:
    z = logits()
    scores = score_tokens(z, PREDICTS, TARGETS, WHOLE, temperature)
    logp = (z[PREDICTS, :V] / temperature).log_softmax(-1).detach()
    uniform = torch.full((V,), 1 / V)
    torch.testing.assert_close(scores.logprobs.detach(), logp.gather(1, TARGETS[:, None])[:, 0])
    torch.testing.assert_close(scores.entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(scores.self_certainty, (uniform * (uniform.log() - logp)).sum(-1))


@pytest.mark.usefixtures("_chunked")
def test_the_gradient_is_that_of_log_softmax_and_padding_gets_none() -> None:
    weights = torch.arange(1.0, 7.0)
    ours, theirs = logits(), logits()
    (score_tokens(ours, PREDICTS, TARGETS, WHOLE, 0.7).logprobs * weights).sum().backward()
    logp = (theirs[PREDICTS, :V] / 0.7).log_softmax(-1)
    (logp.gather(1, TARGETS[:, None])[:, 0] * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    assert not ours.grad[:, V:].any()


def test_ranks_reduce_the_same_chunks_though_their_parts_of_the_vocabulary_differ() -> None:
    """Of 151,936 tokens, padded for two ranks, the last rank has 64 fewer: the chunks of both must be as long."""
    for errors in run_ranks(2, scores_of_many_chunks, free_port()):
        assert max(errors) < 1e-5


def test_bf16_logits_are_scored_in_fp32() -> None:
    z = logits(torch.bfloat16)
    scores = score_tokens(z, PREDICTS, TARGETS, WHOLE, 1.0)
    expected = z.detach().float()[PREDICTS, :V].log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs.detach(), expected)


def test_nothing_to_score_is_no_error() -> None:
    z, nothing = logits(), torch.zeros(0, dtype=torch.long)
    scores = score_tokens(z, nothing, nothing, WHOLE, 1.0)
    scores.logprobs.sum().backward()
    assert len(scores.entropy) == 0
    assert z.grad is not None
    assert not z.grad.any()
