"""What the actors are sent: prompts and responses end to end, the same on the other side of a pickle."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.config.schema import LossSettings
from megatron_coreward.trainer.batch import mini_batches, to_batch, to_sequences
from megatron_coreward.types import (
    VIEWS,
    Completion,
    Completions,
    Prompt,
    RolloutGroup,
    Sequences,
    TokenStats,
    TrainBatch,
)
from tests.rewards.groups import group

LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=8)


def ragged(lengths: list[int], dtype: Any, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, length).astype(dtype) for length in lengths]


def assert_same(after: Any, before: Any) -> None:
    """Arrays and lists of arrays, their types included."""
    if before is None:
        assert after is None
        return
    for a, b in zip(after, before, strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def over(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value, protocol=5))


def test_the_experts_that_engines_chose_travel_with_their_sequences() -> None:
    experts = [np.full((3, 2, 1), i, dtype=np.uint8) for i in range(2)]
    tokens, prompt = np.arange(2, dtype=np.int32), Prompt("", np.arange(2, dtype=np.int32))

    def drawn(*experts: Any) -> list[RolloutGroup]:
        completions = [
            Completion(tokens, tokens.astype(np.float32), "", None, "stop", 0, routed_experts=of_one)
            for of_one in experts
        ]
        (kept,) = over(Completions([completions]))
        return [RolloutGroup("q", "original", "policy", prompt, tuple(kept))]

    sequences = over(to_sequences(drawn(*experts)).select([1, 0]))
    assert_same(sequences.routed_experts, experts[::-1])
    assert to_sequences(drawn(experts[0], None)).routed_experts is None  # all or none


@given(LENGTHS)
def test_sequences_are_prompts_with_their_responses(lengths: list[tuple[int, int]]) -> None:
    groups, expected = [], []
    for i, (prompt_length, length) in enumerate(lengths):
        (prompt,), responses = ragged([prompt_length], np.int32, i), ragged([length, length + 1], np.int32, i + 100)
        completions = tuple(Completion(ids, ids.astype(np.float32), "", None, "stop", 0) for ids in responses)
        groups.append(RolloutGroup(f"q/{i}", "original", "policy", Prompt("", prompt), completions))
        expected += [np.concatenate([prompt, ids]) for ids in responses]
    sequences = to_sequences(groups)
    assert_same(sequences.token_ids, expected)
    assert sequences.prompt_lengths.tolist() == [p for p, _ in lengths for _ in range(2)]


def test_the_losses_of_two_views_are_one_mean_or_the_sum_of_two() -> None:
    """Two questions in two views; the loss of token t of a sequence is its advantage, so it can be had by hand."""
    lengths, advantages = {"original": [2, 4], "rephrased": [3, 1]}, {"original": [1.0, 2.0], "rephrased": [3.0, 5.0]}
    groups, given_advantages = [], []
    for question in range(2):
        for view in VIEWS:
            groups.append(group(["1"], f"q{question}", view, lengths=[lengths[view][question]]))
            given_advantages.append(np.float32([advantages[view][question]]))

    def losses(**changes: Any) -> list[float]:
        settings = LossSettings(**changes)
        args = (to_sequences(groups), groups, given_advantages, settings, 8)
        batch = to_batch(*args, old=None, reference=None, kl_coef=0.0)
        parts = mini_batches(batch, groups, settings, 8)
        responses = [np.asarray(part.sequences.lengths) - part.sequences.prompt_lengths for part in parts]
        return [float((p.token_weights * p.advantages * n).sum()) for p, n in zip(parts, responses, strict=True)]

    of_original, of_rephrased = (1.0 * 2 + 2.0 * 4) / 6, (3.0 * 3 + 5.0 * 1) / 4
    assert losses() == losses(views="mean") == pytest.approx([(10.0 + 14.0) / 10])
    assert losses(views="sum") == pytest.approx([of_original + of_rephrased])
    assert losses(views="sum", aggregation="seq-mean-token-mean") == pytest.approx([1.5 + 4.0])
    # Each update of a batch is weighed as a batch of its own.
    assert losses(views="sum", updates_per_batch=2) == pytest.approx([1.0 + 3.0, 2.0 + 5.0])


@given(LENGTHS, st.booleans())
def test_a_batch_arrives_as_it_was_sent(lengths: list[tuple[int, int]], several: bool) -> None:
    prompts = np.asarray([prompt for prompt, _ in lengths], dtype=np.int32)
    totals, responses = [p + r for p, r in lengths], [r for _, r in lengths]
    logprobs = ragged(responses, np.float32)
    weights = np.arange(len(lengths), dtype=np.float32)
    batch = TrainBatch(
        Sequences(ragged(totals, np.int32), prompts),
        weights,
        2 * weights,
        logprobs,
        ragged(responses, np.float32, 1) if several else None,
        None,
        0.25,
    )
    arrived = over(batch)
    assert_same(arrived.sequences.token_ids, batch.sequences.token_ids)
    assert_same([arrived.sequences.prompt_lengths], [prompts])
    for name in ("advantages", "token_weights", "rollout_logprobs", "old_logprobs", "reference_logprobs"):
        assert_same(getattr(arrived, name), getattr(batch, name))
    assert arrived.kl_coef == 0.25
    stats = TokenStats(logprobs, ragged(responses, np.float32, 2), ragged(responses, np.float32, 3))
    for name in ("logprobs", "entropy", "self_certainty"):
        assert_same(getattr(over(stats), name), getattr(stats, name))


@pytest.mark.parametrize("count", [1, 1000])
def test_the_number_of_arrays_on_the_way_does_not_grow_with_the_sequences(count: int) -> None:
    buffers: list[pickle.PickleBuffer] = []
    sequences = Sequences(ragged([3] * count, np.int32), np.ones(count, dtype=np.int32))
    pickle.dumps(sequences, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3
    assert len(over(Sequences([], np.empty(0, dtype=np.int32)))) == 0


def test_responses_that_were_cut_off_may_be_left_out_of_the_loss() -> None:
    """The others weigh as if these were not there, in every aggregation and every part of the batch."""
    lengths = [[2, 4], [3, 1]]
    groups = [group(["1", "2"], f"q{i}", lengths=of_group) for i, of_group in enumerate(lengths)]
    cut_off = replace(groups[0].completions[1], finish_reason="length")
    groups[0] = replace(groups[0], completions=(groups[0].completions[0], cut_off))

    def weights(**changes: Any) -> list[list[float]]:
        settings = LossSettings(**changes)
        advantages = [np.ones(2, np.float32)] * 2
        args = (to_sequences(groups), groups, advantages, settings, 8)
        batch = to_batch(*args, old=None, reference=None, kl_coef=0.0)
        return [part.token_weights.tolist() for part in mini_batches(batch, groups, settings, 8)]

    assert weights() == [pytest.approx([0.1] * 4)]
    assert weights(mask_truncated=True) == [pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])]
    by_sequence = weights(mask_truncated=True, aggregation="seq-mean-token-mean")
    assert by_sequence == [pytest.approx([1 / 6, 0, 1 / 9, 1 / 3])]
    parts = weights(mask_truncated=True, updates_per_batch=2)
    assert parts == [pytest.approx([1 / 2, 0]), pytest.approx([1 / 4, 1 / 4])]


def test_a_batch_of_nothing_but_cut_off_responses_has_no_loss() -> None:
    cut = group(["1", "2"])
    cut = replace(cut, completions=tuple(replace(c, finish_reason="length") for c in cut.completions))
    args = (to_sequences([cut]), [cut], [np.ones(2, np.float32)], LossSettings(mask_truncated=True), 8)
    assert to_batch(*args, old=None, reference=None, kl_coef=0.0).token_weights.tolist() == [0, 0]
