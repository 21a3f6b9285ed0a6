"""Samples on their way from an engine's process: a few large arrays, where thousands of small ones would cost more to
receive than their bytes do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.rollout.engine import Sample
from megatron_coreward.types import FloatArray, IntArray, cut, join


@dataclass(frozen=True, slots=True)
class PackedSamples:
    """The answers to R requests, S samples in all."""

    counts: tuple[int, ...]  # R, samples of each request
    lengths: NDArray[np.int64]  # [S]
    token_ids: IntArray  # those of all samples, end to end
    logprobs: FloatArray
    texts: tuple[str, ...]  # S
    finish_reasons: tuple[Literal["stop", "length"], ...]  # S
    weight_versions: tuple[int, ...]  # S

    def unpack(self) -> list[list[Sample]]:
        """The samples of each request."""
        ids, logprobs = cut(self.token_ids, self.lengths), cut(self.logprobs, self.lengths)
        samples = map(Sample, ids, logprobs, self.texts, self.finish_reasons, self.weight_versions)
        return [[next(samples) for _ in range(count)] for count in self.counts]


def pack(answers: Sequence[Sequence[Sample]]) -> PackedSamples:
    """What `unpack` makes `answers` of again."""
    samples = [sample for answer in answers for sample in answer]
    token_ids, lengths = join([sample.token_ids for sample in samples])
    return PackedSamples(
        tuple(len(answer) for answer in answers),
        lengths,
        token_ids,
        join([sample.logprobs for sample in samples])[0],
        tuple(sample.text for sample in samples),
        tuple(sample.finish_reason for sample in samples),
        tuple(sample.weight_version for sample in samples),
    )
