"""One noun per stage of a training step, complete when it is built.

The way of a rollout: `Problem` -> `Completion`s, as an engine makes them -> `RolloutGroup` -> `TokenStats` -> rewards
and advantages -> `TrainBatch`. Shapes are given with letters: G rollouts a question, S sequences of a batch, P prompt
tokens, L response tokens. Everything here is plain data: numpy arrays, strings, numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.config.views import VIEWS as VIEWS
from megatron_coreward.config.views import Role as Role
from megatron_coreward.config.views import View as View

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
ExpertArray = NDArray[np.uint8] | NDArray[np.uint16]  # numbers of experts, in the smallest type that has them


class WeightVersion(NamedTuple):
    """Names the weights of a role. What is sent, stamped on completions and written to files is its number:
    `WeightVersion("teacher", 3).number == 7`."""

    role: Role
    update: int  # optimizer steps before

    @property
    def number(self) -> int:
        """2u for the policy after u updates, 2u + 1 for the teacher of that moment."""
        return 2 * self.update + (self.role == "teacher")

    @classmethod
    def of(cls, number: int) -> "WeightVersion":
        """The version that has this number."""
        return cls("teacher" if number % 2 else "policy", number // 2)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model sees it: the chat template applied, and its tokens."""

    text: str
    token_ids: IntArray  # [P]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question of the data set in one or two views. `ground_truth` is never read by a label-free method."""

    uid: str  # stable over runs: "<data_source>/<extra_info.index>"
    prompts: Mapping[View, Prompt]
    ground_truth: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer to a prompt."""

    token_ids: IntArray  # [L], the end-of-sequence token included when the model wrote it
    logprobs: (
        FloatArray  # [L], of the sampled tokens, as the engine that drew each computed it; [0]: nothing reads them
    )
    text: str
    answer: str | None  # the extracted final answer; None: there is none, or none was looked for
    finish_reason: Literal["stop", "length"]
    weight_version: int  # of the weights that sampled its first token
    later_versions: tuple[tuple[int, int], ...] = ()  # (index of the first token, version), if others went on with it
    routed_experts: ExpertArray | None = None  # [P + L - 1, layers, top k] that the engine sent each token to, if asked

    @property
    def token_versions(self) -> NDArray[np.int64]:
        """[L] the version of the weights that drew each token."""
        versions = np.full(len(self.token_ids), self.weight_version, dtype=np.int64)
        for first, version in self.later_versions:
            versions[first:] = version
        return versions


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions that one role sampled for one view of one question."""

    uid: str
    view: View
    role: Role
    prompt: Prompt
    completions: tuple[Completion, ...]  # G

    @property
    def answers(self) -> list[str | None]:
        return [c.answer for c in self.completions]


def join(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Arrays laid end to end, and their lengths: to pickle ten thousand small arrays costs more than their bytes do."""
    lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    return (np.concatenate(arrays) if len(arrays) else np.empty(0, dtype=np.float32)), lengths


def cut(joined: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    """What `join` has joined, as views."""
    ends = np.cumsum(lengths).tolist()
    return [joined[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


Joined = tuple[NDArray[Any], NDArray[np.int64]]


class Completions(list[list[Completion]]):
    """The completions of R requests, request after request. Sent between processes as a few large arrays."""

    def __reduce__(self) -> tuple[Any, ...]:
        every = [completion for of_request in self for completion in of_request]
        token_ids, lengths = join([c.token_ids for c in every])
        logprobs, as_many = join([c.logprobs for c in every])
        if np.array_equal(as_many, lengths):
            as_many = lengths  # sent once
        columns = [tuple(getattr(c, name) for c in every) for name in _PLAIN_COLUMNS]
        return _completions, (tuple(map(len, self)), (token_ids, lengths), (logprobs, as_many), columns)


_PLAIN_COLUMNS = ("text", "answer", "finish_reason", "weight_version", "later_versions", "routed_experts")


def _completions(
    counts: tuple[int, ...], token_ids: Joined, logprobs: Joined, columns: list[tuple[Any, ...]]
) -> Completions:
    every = map(Completion, cut(*token_ids), cut(*logprobs), *columns)
    return Completions([next(every) for _ in range(count)] for count in counts)


class EngineInterval(NamedTuple):
    """What an engine did for a while. In what no interval covers it was idle."""

    engine: int
    kind: Literal["sample", "sync"]
    version: int  # of the weights that it sampled from, or received (`WeightVersion.of` tells the role)
    begin: float  # seconds of `time.time`
    end: float
    sequences: float = 0.0  # decoded at once, their mean over the steps; 0 for a weight sync, or if it is not known


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What a model says of the response tokens of S sequences; each entry an array [L_s]. Entropy and self-certainty
    have no entries if the log-probs alone were asked for."""

    logprobs: Sequence[FloatArray]  # of the tokens that were sampled
    entropy: Sequence[FloatArray]  # of the next-token distribution, nats
    self_certainty: Sequence[FloatArray]  # KL(uniform || p) of the next-token distribution, nats

    def __reduce__(self) -> tuple[Any, ...]:
        return _token_stats, (join(self.logprobs), join(self.entropy), join(self.self_certainty))


def _token_stats(*joined: Joined) -> TokenStats:
    return TokenStats(*(cut(*arrays) for arrays in joined))


@dataclass(frozen=True, slots=True)
class Sequences:
    """S prompts with their responses, as token ids."""

    token_ids: Sequence[IntArray]  # S x [P_s + L_s]
    prompt_lengths: IntArray  # [S], each at least 1
    routed_experts: Sequence[ExpertArray] | None = None  # S x [P_s + L_s - 1, layers, top k], to be replayed

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def lengths(self) -> list[int]:
        """[S] tokens of prompt and response together."""
        return [len(ids) for ids in self.token_ids]

    def select(self, rows: Sequence[int]) -> "Sequences":
        """The given sequences, in the given order."""
        experts = None if self.routed_experts is None else [self.routed_experts[i] for i in rows]
        prompt_lengths = self.prompt_lengths[np.asarray(rows, dtype=np.int64)]
        return Sequences([self.token_ids[i] for i in rows], prompt_lengths, experts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _sequences, (join(self.token_ids), self.prompt_lengths, self.routed_experts)


def _sequences(token_ids: Joined, prompt_lengths: IntArray, routed_experts: Sequence[ExpertArray] | None) -> Sequences:
    return Sequences(cut(*token_ids), prompt_lengths, routed_experts)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What an update reads: S sequences and, for each, what weighs its tokens.

    The loss is the plain sum over sequences and response tokens of `token_weights[s] * loss(s, t)`; the weights hold
    the normalisation over the *whole* batch, so every cut into micro-batches and ranks gives the same loss.
    """

    sequences: Sequences
    advantages: FloatArray  # [S]
    token_weights: FloatArray  # [S]
    rollout_logprobs: Sequence[FloatArray] | None  # S x [L_s], from the rollout engine; None: not sampled by one
    old_logprobs: Sequence[FloatArray] | None  # S x [L_s]; None: the current policy is the old one
    reference_logprobs: Sequence[FloatArray] | None  # S x [L_s]; None: no KL term
    kl_coef: float  # weight of the KL term

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Sequence[int]) -> "TrainBatch":
        """The sub-batch of the given sequences, in the given order; weights stay as they are."""

        def pick(ragged: Sequence[FloatArray] | None) -> list[FloatArray] | None:
            return None if ragged is None else [ragged[i] for i in rows]

        index = np.asarray(rows, dtype=np.int64)
        return TrainBatch(
            sequences=self.sequences.select(rows),
            advantages=self.advantages[index],
            token_weights=self.token_weights[index],
            rollout_logprobs=pick(self.rollout_logprobs),
            old_logprobs=pick(self.old_logprobs),
            reference_logprobs=pick(self.reference_logprobs),
            kl_coef=self.kl_coef,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        ragged = (self.rollout_logprobs, self.old_logprobs, self.reference_logprobs)
        joined = tuple(None if arrays is None else join(arrays) for arrays in ragged)
        return _train_batch, (self.sequences, self.advantages, self.token_weights, joined, self.kl_coef)


def _train_batch(
    sequences: Sequences,
    advantages: FloatArray,
    token_weights: FloatArray,
    joined: tuple[Joined | None, ...],
    kl_coef: float,
) -> TrainBatch:
    rollout, old, reference = (None if arrays is None else cut(*arrays) for arrays in joined)
    return TrainBatch(sequences, advantages, token_weights, rollout, old, reference, kl_coef)
