"""What engines are asked for, and what they answer with. Plain data; imports without vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron_coreward.config.schema import AnswerFormat
from megatron_coreward.types import Completion, Completions, EngineInterval, IntArray, Role


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """Draw `n` samples for one prompt. Temperature 0 takes the most likely token."""

    prompt: Sequence[int] | IntArray  # token ids
    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    answer_formats: Sequence[AnswerFormat] = ()  # in which a final answer is looked for; none: not at all
    stop_at: Sequence[str] = ()  # strings behind which no answer is looked for (`rewards.answer.extract_answer`)
    stop: Sequence[str] = ()  # strings that end a sample; their tokens are part of it
    top_k: int = 0  # tokens to draw from, the most likely ones; 0: all
    logprobs: bool = True  # of the sampled tokens; False if nothing reads them, which is faster


class GroupName(NamedTuple):
    """Names a group of rollouts within a run."""

    step: int  # that the group is drawn for
    role: Role  # whose weights draw it
    place: int  # among the groups of the role in the step


class GroupWatcher(Protocol):
    """Hears of each sample of a group as it ends, and may end the group."""

    def completed(self, sample: int, completion: Completion) -> bool:
        """Whether no further sample of the group is needed: the rest is aborted, and the group is complete.

        Called on a thread of its own, one call at a time, once for a sample, in the order in which samples end.
        """


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """A group of rollouts to draw; all its samples are drawn by one engine, which reads the prompt once."""

    name: GroupName
    request: SamplingRequest
    watcher: GroupWatcher | None = None


@dataclass(frozen=True, slots=True)
class Fed:
    """Some of the samples of a group, on their way to the engine that draws them."""

    name: GroupName
    request: SamplingRequest
    samples: tuple[int, ...]  # which of the request's n


@dataclass(frozen=True, slots=True)
class Taken:
    """What an engine reports: everything since the request before."""

    ended: tuple[tuple[GroupName, int], ...]  # the samples that have ended, by group and number
    completions: Completions  # of them, as one request
    aborted: tuple[tuple[GroupName, int], ...]  # each sample that was aborted, and the tokens that it had by then
    intervals: tuple[EngineInterval, ...]
