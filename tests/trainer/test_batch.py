"""What the actors are sent: prompts and responses end to end, the same on the other side of a pickle."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.trainer.batch import to_sequences
from megatron_coreward.types import Completion, Prompt, RolloutGroup, Sequences, TokenStats, TrainBatch

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
