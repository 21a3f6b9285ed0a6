"""Token statistics and their gradients against the definitions, in fp64, on a whole, uncut vocabulary."""

import math

import pytest
import torch

from megatron_coreward.actor import token_stats
from megatron_coreward.actor.token_stats import Scores, VocabularyShard, score_tokens
from tests.actor.ranks import free_port, run_ranks
from tests.actor.scores_on_ranks import scores_of_many_chunks

N, H, V, PADDING = 37, 16, 1003, 5
WHOLE = VocabularyShard(0, V, V, None)


@pytest.fixture(params=[(1 << 24, 1 << 18), (5 * V, 2 * V)], ids=["one chunk", "many chunks"])
def _chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, block = request.param
    monkeypatch.setitem(token_stats.CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(token_stats.BLOCK_ELEMENTS, "cpu", block)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [N, H], an output layer [V + PADDING, H], and targets [N]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V + PADDING, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


FACTORS = torch.linspace(-1, 2, N)


def in_fp64(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[Scores, torch.Tensor, torch.Tensor]:
    """The definitions, and the gradients of hidden states and weight for log-probs weighed by FACTORS."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logp = (h @ w[:V].t() / temperature).log_softmax(-1)
    chosen = logp.gather(1, targets[:, None])[:, 0]
    (chosen * FACTORS).sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    entropy = -(logp.exp() * logp).sum(-1)
    certainty = (torch.tensor(1 / V, dtype=torch.float64).log() - logp).mean(-1)
    return Scores(chosen.detach(), entropy.detach(), certainty.detach()), h.grad, w.grad


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.detach().double(), expected, atol=tolerance, rtol=tolerance)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's norm over that of what is right."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_are_those_of_the_definitions_in_fp64(temperature: float) -> None:
    hidden, weight, targets = inputs()
    expected, of_hidden, of_weight = in_fp64(hidden, weight, targets, temperature)
    scores = score_tokens(hidden, weight, targets, WHOLE, temperature)
    (scores.logprobs * FACTORS).sum().backward()
    close(scores.logprobs, expected.logprobs, 1e-6)
    close(scores.entropy, expected.entropy, 1e-6)
    close(scores.self_certainty, expected.self_certainty, 1e-6)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert off(hidden.grad, of_hidden) < 1e-6
    assert off(weight.grad, of_weight) < 1e-6
    assert not weight.grad[V:].any()


@pytest.mark.usefixtures("_chunked")
def test_the_gradient_of_the_weight_is_added_to_the_main_gradient_where_there_is_one() -> None:
    hidden, weight, targets = inputs()
    _, _, of_weight = in_fp64(hidden, weight, targets, 1.0)
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    (score_tokens(hidden, weight, targets, WHOLE, 1.0).logprobs * FACTORS).sum().backward()
    assert weight.grad is None
    assert off(weight.main_grad - 1, of_weight) < 1e-6  # type: ignore[attr-defined]


@pytest.mark.ranks
def test_ranks_with_unequal_parts_of_the_vocabulary_agree_with_the_whole_one() -> None:
    """Of 151,936 tokens, padded for two ranks, the last rank has 64 fewer; a rank may have none at all."""
    for errors in run_ranks(2, scores_of_many_chunks, free_port()):
        assert max(errors) < 5e-6  # of log-probs near 20 nats and gradients near 10


@pytest.mark.usefixtures("_chunked")
def test_bf16_states_are_scored_in_fp32_and_their_gradient_reaches_an_fp32_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_stats, "WEIGHT_SLICE_ELEMENTS", 100 * H)
    hidden, weight, targets = inputs(torch.bfloat16)
    logits = (hidden @ weight[:V].t()).detach()  # rounded, as an engine's are
    expected = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    _, of_hidden, of_weight = in_fp64(hidden, weight, targets, 1.0)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    scores = score_tokens(hidden, weight, targets, WHOLE, 1.0)
    (scores.logprobs * FACTORS).sum().backward()
    assert scores.logprobs.dtype == torch.float32
    close(scores.logprobs, expected, 1e-6)
    assert hidden.grad is not None
    for found, want in ((hidden.grad, of_hidden), (weight.main_grad, of_weight)):  # type: ignore[attr-defined]
        assert off(found, want) < 1e-2


@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.9999])
def test_the_gradient_of_confident_tokens_survives_bf16(probability: float) -> None:
    """In BF16 the next number below 1 is 0.996: p - 1 that is made of a rounded p would be 0, or wrong by half."""
    hidden, weight, targets = inputs(torch.bfloat16)
    with torch.no_grad():
        weight.zero_()
        weight[targets[0], 0] = 1.0
        hidden.zero_()
        hidden[:, 0] = math.log(probability / (1 - probability) * (V - 1))
    targets = targets[:1].expand(len(hidden)).contiguous()
    _, of_hidden, of_weight = in_fp64(hidden, weight, targets, 1.0)
    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    (score_tokens(hidden, weight, targets, WHOLE, 1.0).logprobs * FACTORS).sum().backward()
    assert hidden.grad is not None
    assert off(hidden.grad[:, 0], of_hidden[:, 0]) < 1e-2
    assert off(weight.main_grad[targets[0], 0], of_weight[targets[0], 0]) < 1e-2  # type: ignore[attr-defined]


OF_ENTROPY = torch.linspace(1, -0.5, N)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_the_gradient_of_the_entropy_is_that_of_its_definition_in_fp64(
    temperature: float, dtype: torch.dtype, tolerance: float
) -> None:
    hidden, weight, targets = inputs(dtype)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logp = (h @ w[:V].t() / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (logp.gather(1, targets[:, None])[:, 0] * FACTORS + entropy * OF_ENTROPY).sum().backward()

    weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    scores = score_tokens(hidden, weight, targets, WHOLE, temperature, entropy_gradient=True)
    (scores.logprobs * FACTORS + scores.entropy * OF_ENTROPY).sum().backward()
    assert hidden.grad is not None
    assert h.grad is not None
    assert w.grad is not None
    assert off(hidden.grad, h.grad) < tolerance
    assert off(weight.main_grad, w.grad) < tolerance  # type: ignore[attr-defined]


def test_the_gradient_of_the_entropy_is_that_of_finite_differences() -> None:
    hidden, weight, targets = inputs()
    hidden, weight, targets = hidden[:3, :4].detach(), weight[:9, :4].detach(), targets[:3] % 7
    shard, step = VocabularyShard(0, 7, 7, None), 1e-2
    moved = hidden.clone().requires_grad_()
    score_tokens(moved, weight, targets, shard, 1.0, entropy_gradient=True).entropy.sum().backward()

    def entropy(states: torch.Tensor) -> float:
        return float(score_tokens(states, weight, targets, shard, 1.0).entropy.double().sum())

    assert moved.grad is not None
    for row in range(3):
        for column in range(4):
            change = torch.zeros_like(hidden)
            change[row, column] = step
            slope = (entropy(hidden + change) - entropy(hidden - change)) / (2 * step)
            assert float(moved.grad[row, column]) == pytest.approx(slope, abs=2e-4)


def test_statistics_that_nobody_asked_for_are_not_computed() -> None:
    hidden, weight, targets = inputs()
    alone, both = (score_tokens(hidden, weight, targets, WHOLE, 1.0, wanted) for wanted in (False, True))
    assert torch.equal(alone.logprobs, both.logprobs)
    assert len(alone.entropy) == len(alone.self_certainty) == 0


def test_compiled_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPU the row functions are compiled. The compiler is here on CPU; the mathematics that it is given is the
    same."""
    found = []
    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(token_stats, "_kernel", lambda function, _: torch.compile(function, dynamic=True))
        hidden, weight, targets = inputs(torch.bfloat16)
        scores = score_tokens(hidden, weight, targets, WHOLE, 0.7)
        (scores.logprobs * FACTORS).sum().backward()
        assert hidden.grad is not None
        found.append((scores.logprobs.detach(), scores.entropy, scores.self_certainty, hidden.grad.float()))
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, atol=2e-6 if plain is not found[0][3] else 1e-3, rtol=1e-5)


def test_nothing_to_score_is_no_error() -> None:
    hidden, weight, _ = inputs()
    nothing = torch.zeros(0, dtype=torch.long)
    scores = score_tokens(hidden[nothing], weight, nothing, WHOLE, 1.0)
    scores.logprobs.sum().backward()
    assert len(scores.entropy) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
