"""Samples are drawn from the model, carry the log-probs of the draw, and are the same at the same seed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.types import Completion
from tests.rollout.engine_process import sync

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

VERSION = 4
PROMPT = list(range(10, 40))
REQUEST = SamplingRequest(PROMPT, n=8, seed=1, temperature=1.0, top_p=1.0, max_tokens=40)


@pytest.fixture
def engine(synced: Callable[[str, int], Any]) -> Any:
    return synced("untied", VERSION)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str, int], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint("untied", VERSION), dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any, sample: Completion) -> torch.Tensor:
    """[L, V] that the tokens of a sample are drawn from, at temperature 1."""
    tokens = torch.tensor([PROMPT + sample.token_ids.tolist()])
    rows: torch.Tensor = model(tokens).logits[0, len(PROMPT) - 1 : -1]
    return rows


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [sample.token_ids.tolist() for group in groups for sample in group]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_at_the_temperature(engine: Any, model: Any, temperature: float) -> None:
    (group,) = engine.sample([replace(REQUEST, temperature=temperature)], VERSION)
    for sample in group:
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
        expected = (logits(model, sample) / temperature).log_softmax(-1)
        chosen = torch.as_tensor(sample.token_ids, dtype=torch.long)[:, None]
        np.testing.assert_allclose(sample.logprobs, expected.gather(-1, chosen)[:, 0].numpy(), atol=1e-4)


def test_logprobs_under_top_p_are_those_within_the_nucleus(engine: Any, model: Any) -> None:
    top_p = 0.7
    (group,) = engine.sample([replace(REQUEST, top_p=top_p)], VERSION)
    for sample in group:
        probs, order = logits(model, sample).softmax(-1).sort(-1, descending=True)
        probs[probs.cumsum(-1) - probs >= top_p] = 0.0
        nucleus = torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))
        chosen = torch.as_tensor(sample.token_ids, dtype=torch.long)[:, None]
        np.testing.assert_allclose(np.exp(sample.logprobs), nucleus.gather(-1, chosen)[:, 0].numpy(), atol=1e-4)


def test_the_same_seed_gives_the_same_samples_whatever_else_is_in_the_batch(engine: Any) -> None:
    others = [replace(REQUEST, prompt=PROMPT[i:], seed=100 + i, n=3) for i in range(6)]
    alone = engine.sample([REQUEST], VERSION)
    assert tokens(engine.sample([REQUEST], VERSION)) == tokens(alone)
    together = engine.sample([*others[:3], REQUEST, *others[3:]], VERSION)
    assert [len(group) for group in together] == [3, 3, 3, 8, 3, 3, 3]
    assert tokens(together[3:4]) == tokens(alone)


def test_the_same_seed_gives_the_same_samples_after_an_update_to_the_same_weights(
    engine: Any, checkpoint: Callable[[str, int], Path]
) -> None:
    before = engine.sample([REQUEST], VERSION)
    sync(engine, checkpoint("untied", VERSION), VERSION)
    assert tokens(engine.sample([REQUEST], VERSION)) == tokens(before)


def test_samples_differ_within_a_request_and_between_neighbouring_seeds(engine: Any) -> None:
    drawn = tokens(engine.sample([REQUEST, replace(REQUEST, seed=2), replace(REQUEST, seed=3)], VERSION))
    assert len({tuple(sample) for sample in drawn}) == len(drawn)


def test_tokens_are_drawn_with_their_probabilities(engine: Any, model: Any) -> None:
    requests = [replace(REQUEST, n=64, seed=seed, max_tokens=1) for seed in range(32)]
    drawn = [sample for group in engine.sample(requests, VERSION) for sample in group]
    probs = logits(model, drawn[0])[0].softmax(-1).double().numpy()
    counts = np.bincount([sample.token_ids[0] for sample in drawn], minlength=len(probs))
    often = probs * len(drawn) >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probs[often], probs[~often].sum()) * len(drawn)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(observed) - 1
    assert degrees > 20
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_sample_ends_with_the_end_token_or_at_the_length(engine: Any, checkpoint: Callable[[str, int], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("untied", VERSION))
    requests = [replace(REQUEST, n=16, seed=seed, max_tokens=100) for seed in range(4)]
    drawn = [sample for group in engine.sample(requests, VERSION) for sample in group]
    assert {sample.finish_reason for sample in drawn} == {"stop", "length"}
    for sample in drawn:
        ended = sample.token_ids[-1] == tokenizer.eos_token_id
        assert ended == (sample.finish_reason == "stop")
        assert ended or len(sample.token_ids) == 100
        assert tokenizer.eos_token_id not in sample.token_ids[:-1]
        assert len(sample.logprobs) == len(sample.token_ids)
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert tokenizer.eos_token not in sample.text


def test_more_prompts_than_a_step_reads_are_no_problem(engine: Any) -> None:
    # 50 prompts of 300 tokens: several times the tokens of a step, where vLLM would read seeded prompts in parts.
    requests = [replace(REQUEST, prompt=[3 + i] * 300, n=1, seed=i, max_tokens=2) for i in range(50)]
    first = tokens(engine.sample(requests, VERSION))
    assert tokens(engine.sample(requests, VERSION)) == first


def test_prompt_and_answer_may_fill_the_engines_length(engine: Any) -> None:
    (samples,) = engine.sample([replace(REQUEST, prompt=[5] * 472)], VERSION)  # 512 tokens with an answer of 40
    lengths = [len(sample.token_ids) for sample in samples if sample.finish_reason == "length"]
    assert lengths
    assert set(lengths) == {40}


def test_no_requests_give_no_samples(engine: Any) -> None:
    assert engine.sample([], VERSION) == []


@pytest.mark.parametrize("prompt", [[], [5] * 480])
def test_a_request_that_does_not_fit_is_refused(engine: Any, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens with answers of up to 40 does not fit"):
        engine.sample([replace(REQUEST, prompt=prompt)], VERSION)


@pytest.mark.parametrize("count", [1, 512])
def test_a_sequence_that_cannot_be_scored_is_refused(engine: Any, count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot score {count} tokens"):
        engine.score([5] * count)


def test_sleeping_without_a_gpu_changes_nothing(engine: Any) -> None:
    before = tokens(engine.sample([REQUEST], VERSION))
    engine.sleep()
    engine.wake()
    assert tokens(engine.sample([REQUEST], VERSION)) == before
