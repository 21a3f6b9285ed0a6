"""Samples arrive as they were sent, whatever the way."""

import pickle
from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rollout.engine import Sample
from megatron_coreward.rollout.packed import pack


def sample(length: int, seed: int) -> Sample:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, length).astype(np.int32)
    reason = "stop" if seed % 2 else "length"
    return Sample(ids, rng.standard_normal(length).astype(np.float32), f"text {seed} \\boxed{{1}}", reason, seed)


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5))
def test_samples_come_out_as_they_went_in(lengths: list[list[int]]) -> None:
    sent = [[sample(length, 10 * r + s) for s, length in enumerate(request)] for r, request in enumerate(lengths)]
    received = pickle.loads(pickle.dumps(pack(sent), protocol=5)).unpack()
    assert [len(answer) for answer in received] == [len(answer) for answer in sent]
    for before, after in zip(chain.from_iterable(sent), chain.from_iterable(received), strict=True):
        assert (after.text, after.finish_reason, after.weight_version) == (
            before.text,
            before.finish_reason,
            before.weight_version,
        )
        for name in ("token_ids", "logprobs"):
            assert getattr(after, name).dtype == getattr(before, name).dtype
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_thousands_of_samples_are_a_few_arrays() -> None:
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(pack([[sample(5, i) for i in range(1000)]]), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 3
