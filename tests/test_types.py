"""Completions arrive as they were sent, and as a few arrays."""

import pickle
from dataclasses import replace
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.types import Completion, Completions


def completion(length: int, seed: int) -> Completion:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, length).astype(np.int32)
    reason = "stop" if seed % 2 else "length"
    logprobs = rng.standard_normal(length).astype(np.float32)
    later = ((1, seed + 2),) if length > 1 and seed % 2 else ()
    return Completion(ids, logprobs, f"text {seed} \\boxed{{1}}", "1" if seed % 3 else None, reason, seed, later)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5))
def test_completions_come_out_as_they_went_in(lengths: list[list[int]]) -> None:
    sent = [[completion(length, 10 * r + s) for s, length in enumerate(request)] for r, request in enumerate(lengths)]
    received = pickle.loads(pickle.dumps(Completions(sent), protocol=5))
    assert [len(answer) for answer in received] == [len(answer) for answer in sent]
    for before, after in zip(chain.from_iterable(sent), chain.from_iterable(received), strict=True):
        for name in ("text", "answer", "finish_reason", "weight_version", "later_versions"):
            assert getattr(after, name) == getattr(before, name)
        for name in ("token_ids", "logprobs"):
            assert getattr(after, name).dtype == getattr(before, name).dtype
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_thousands_of_completions_are_a_few_arrays() -> None:
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(Completions([[completion(5, i) for i in range(1000)]]), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3


def test_completions_without_log_probs_come_out_without_any() -> None:
    sent = [completion(3, 1), replace(completion(4, 2), logprobs=np.empty(0, dtype=np.float32))]
    (received,) = pickle.loads(pickle.dumps(Completions([sent])))
    assert [(len(c.token_ids), len(c.logprobs)) for c in received] == [(3, 3), (4, 0)]


def test_each_token_has_the_version_of_the_weights_that_drew_it() -> None:
    one = replace(completion(6, 2), later_versions=((2, 4), (5, 8)))
    assert one.token_versions.tolist() == [2, 2, 4, 4, 4, 8]
    assert completion(0, 2).token_versions.tolist() == []
