"""Completions arrive as they were sent, and as a few arrays."""

import pickle
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
    return Completion(ids, logprobs, f"text {seed} \\boxed{{1}}", "1" if seed % 3 else None, reason, seed)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5))
def test_completions_come_out_as_they_went_in(lengths: list[list[int]]) -> None:
    sent = [[completion(length, 10 * r + s) for s, length in enumerate(request)] for r, request in enumerate(lengths)]
    received = pickle.loads(pickle.dumps(Completions(sent), protocol=5))
    assert [len(answer) for answer in received] == [len(answer) for answer in sent]
    for before, after in zip(chain.from_iterable(sent), chain.from_iterable(received), strict=True):
        assert (after.text, after.answer, after.finish_reason, after.weight_version) == (
            before.text,
            before.answer,
            before.finish_reason,
            before.weight_version,
        )
        for name in ("token_ids", "logprobs"):
            assert getattr(after, name).dtype == getattr(before, name).dtype
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_thousands_of_completions_are_a_few_arrays() -> None:
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(Completions([[completion(5, i) for i in range(1000)]]), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3
