"""Draws samples step after step, on a thread of its own, while new ones are asked for and ended ones are taken.

Whoever needs the engine for something else (new weights, the canary's log-probs, a validation) makes the loop stand
still first. The engine is then empty: what was drawn of unfinished samples is kept here, as plain tokens, and goes on
later as a prompt. So the cached keys and values of a sample are always those of the weights that draw its next token
(they are computed again, in one forward pass over the sample so far), and a check of new weights, or a validation, is
computed in the batches in which it would be computed without the stream. vLLM's own pause, in its mode `keep`, would
leave both the requests and the keys and values of the old weights in the engine.

Invariants (tests/rollout/test_step_loop.py, tests/rollout/test_streaming.py):
  1. A token is drawn only from weights of the version that `go_on` named last, and of the role that its group asks for.
  2. Each sample that is fed ends once, or is aborted; its versions and log-probs are those of each of its tokens.
  3. A sample that nothing interrupts is the one that `RolloutEngine.sample` draws.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_coreward.rollout.requests import Fed, GroupName, SamplingRequest
from megatron_coreward.types import EngineInterval, FloatArray, IntArray, Role, WeightVersion

GATHER_S = 0.03  # for more samples, once one has ended: to take each by itself would keep the driver busy


class Drawn(NamedTuple):
    """Tokens that an engine has drawn for a sample, since the sample was added."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] | FloatArray  # as many, or none
    finish_reason: Literal["stop", "length"] | None  # None: it has not ended


class Steps(Protocol):
    """An engine that can be stepped (`rollout.vllm_steps.VllmSteps`). Samples have the numbers that they are given."""

    def add(self, number: int, prompt: list[int], request: SamplingRequest, seed: int, max_tokens: int) -> None:
        """Takes a sample; it is drawn with the others from the next step on."""

    def step(self) -> Mapping[int, Drawn]:
        """Draws a token of every sample; returns those that have ended."""

    def withdraw(self, numbers: Iterable[int]) -> Mapping[int, Drawn]:
        """Takes samples out; returns what was drawn of each."""


@dataclass(slots=True)
class Sample:
    """A sample on its way."""

    name: GroupName
    index: int  # of the request's n
    request: SamplingRequest
    seed: int  # of its first token
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)  # (index of the first token, version of the weights)
    cuts: list[int] = field(default_factory=list)  # tokens that it had when it went on after an interruption
    finish_reason: Literal["stop", "length"] | None = None

    def take(self, drawn: Drawn) -> None:
        """Appends what was drawn; versions from which nothing was drawn are forgotten."""
        self.token_ids += drawn.token_ids
        self.logprobs += [float(value) for value in drawn.logprobs]
        self.finish_reason = drawn.finish_reason
        if self.starts and self.starts[-1][0] == len(self.token_ids):
            self.starts.pop()

    def cut(self, length: int, finish_reason: Literal["stop"]) -> None:
        """Leaves the first tokens."""
        del self.token_ids[length:], self.logprobs[length:]
        self.starts = [start for start in self.starts if start[0] < length]
        self.finish_reason = finish_reason

    def go_on(self, version: int) -> None:
        """Its next token is drawn from weights of this version."""
        if self.token_ids and len(self.token_ids) not in self.cuts[-1:]:
            self.cuts.append(len(self.token_ids))
        if not self.starts or self.starts[-1][1] != version:
            self.starts.append((len(self.token_ids), version))

    @property
    def arrays(self) -> tuple[IntArray, FloatArray]:
        return np.asarray(self.token_ids, dtype=np.int32), np.asarray(self.logprobs, dtype=np.float32)


class StepLoop:
    """The loop of one engine. `feed`, `abort` and `take` may be called from any thread, at any time."""

    def __init__(self, steps: Steps, max_num_seqs: int, spread: Callable[[int], int]) -> None:
        """Args:
        max_num_seqs: most samples that are drawn at once.
        spread: makes a seed that is far from those of neighbouring numbers.
        """
        self._steps, self._room, self._spread = steps, max_num_seqs, spread
        self._spare = -(-max_num_seqs // 4)  # samples that it has beyond its room (`rollout_engines.room_of`)
        self._state = threading.Condition()
        self._waiting: dict[Role, deque[Sample]] = {"policy": deque(), "teacher": deque()}
        self._running: dict[int, Sample] = {}
        self._aborted: set[GroupName] = set()  # groups whose running samples are to be withdrawn
        self._ended: list[Sample] = []
        self._withdrawn: list[tuple[GroupName, int]] = []  # samples that were aborted, and their tokens
        self._version: int | None = None  # of the weights to draw from
        self._holders = 0  # those who want the loop to stand still
        self._stepping = self._closed = False
        self._error: BaseException | None = None
        self._counter = 0
        self._busy = _Busy()
        self._thread = threading.Thread(target=self._run, name="step loop", daemon=True)
        self._thread.start()

    def feed(self, fed: Sequence[Fed]) -> None:
        """Takes samples to draw, behind those that it has."""
        with self._state:
            for one in fed:
                first = self._spread(one.request.seed)  # vLLM gives sample i the seed + i, too
                self._waiting[one.name.role] += (
                    Sample(one.name, index, one.request, first + index) for index in one.samples
                )
            self._state.notify_all()

    def abort(self, names: Iterable[GroupName]) -> None:
        """Draws no further token for these groups."""
        with self._state:
            self._aborted |= set(names)
            self._state.notify_all()

    def go_on(self, version: int) -> None:
        """The engine has weights of this version, which are in order: they may be drawn from."""
        with self._state:
            self._version = version
            self._state.notify_all()

    @contextmanager
    def standing_still(self, new_weights: bool = False) -> Iterator[None]:
        """No step is taken within, and the engine is empty.

        Args:
            new_weights: whether the loop has nothing to draw from afterwards, until `go_on`.
        """
        with self._state:
            self._holders += 1
        try:
            with self._state:
                self._state.wait_for(lambda: not self._stepping)
                self._busy.end(self._version)
                self._withdraw_all()
                if new_weights:
                    self._version = None
            yield
        finally:
            with self._state:
                self._holders -= 1
                self._state.notify_all()

    def take(self, patience_s: float) -> tuple[list[Sample], list[tuple[GroupName, int]], list[EngineInterval]]:
        """Waits for a sample that has ended or was aborted, `patience_s` at most, and for others that follow it soon:
        those that have ended, the group and the tokens of each that was aborted, and what the engine did (as engine 0),
        since this was asked last."""
        with self._state:
            if self._state.wait_for(self._has_news, patience_s):
                self._state.wait_for(self._no_more_soon, GATHER_S)
            if self._error is not None:
                raise self._error
            ended, self._ended = self._ended, []
            withdrawn, self._withdrawn = self._withdrawn, []
            return ended, withdrawn, self._busy.take()

    def _has_news(self) -> bool:
        return bool(self._ended or self._withdrawn or self._error or self._closed)

    def _no_more_soon(self) -> bool:
        """Whether to wait for more would be in vain, or would let the engine run out of samples to begin."""
        ready = len(self._ended) >= self._spare or not (self._stepping or self._may_step())
        return ready or self._closed or self._error is not None

    def close(self) -> None:
        """Ends the thread."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._begin_step():
                ended = self._steps.step()
                self._end_step(ended)
        except BaseException as error:  # whoever takes next hears of it
            with self._state:
                self._error, self._stepping = error, False
                self._state.notify_all()

    def _begin_step(self) -> bool:
        """Waits until there is something to draw and fills the engine; False: the loop is over."""
        with self._state:
            while True:
                if self._closed:
                    return False
                if self._aborted and not self._holders:
                    self._withdraw_aborted()
                if self._may_step():
                    break
                self._busy.end(self._version)
                self._state.wait()
            assert self._version is not None
            self._fill(self._version)
            self._busy.step(len(self._running))
            self._stepping = True
            return True

    def _may_step(self) -> bool:
        if self._holders or self._version is None:
            return False
        return bool(self._running or self._waiting[WeightVersion.of(self._version).role])

    def _fill(self, version: int) -> None:
        waiting = self._waiting[WeightVersion.of(version).role]
        while waiting and len(self._running) < self._room:
            sample = waiting.popleft()
            sample.go_on(version)
            drawn = len(sample.token_ids)
            request = sample.request
            self._counter += 1
            self._running[self._counter] = sample
            self._steps.add(
                self._counter,
                [*np.asarray(request.prompt).tolist(), *sample.token_ids],
                request,
                # The generator of what was drawn is gone: tokens after an interruption have one of their own. The seeds
                # of a group are neighbours: numbers of tokens added to them as they are could make two of them equal.
                self._spread(self._spread(sample.seed) + drawn) if drawn else sample.seed,
                request.max_tokens - drawn,
            )

    def _end_step(self, ended: Mapping[int, Drawn]) -> None:
        with self._state:
            for number, drawn in ended.items():
                sample = self._running.pop(number)
                sample.take(drawn)
                self._ended.append(sample)
            self._stepping = False
            self._state.notify_all()

    def _withdraw_all(self) -> None:
        """Back to the front of those that wait, in the order in which they came."""
        for number, drawn in self._steps.withdraw(self._running).items():
            self._running[number].take(drawn)
        for sample in reversed(self._running.values()):
            self._waiting[sample.name.role].appendleft(sample)
        self._running.clear()

    def _withdraw_aborted(self) -> None:
        names, self._aborted = self._aborted, set()
        gone = [number for number, sample in self._running.items() if sample.name in names]
        if gone:
            for number, drawn in self._steps.withdraw(gone).items():
                self._running[number].take(drawn)
        samples = [self._running.pop(number) for number in gone]
        for role, waiting in self._waiting.items():
            samples += [sample for sample in waiting if sample.name in names]
            self._waiting[role] = deque(sample for sample in waiting if sample.name not in names)
        self._withdrawn += [(sample.name, len(sample.token_ids)) for sample in samples]
        self._state.notify_all()


class _Busy:
    """When the engine drew samples, and how many at once."""

    def __init__(self) -> None:
        self._begin: float | None = None
        self._steps = self._sequences = 0
        self._intervals: list[EngineInterval] = []

    def step(self, sequences: int) -> None:
        if self._begin is None:
            self._begin = time.time()
        self._steps += 1
        self._sequences += sequences

    def end(self, version: int | None) -> None:
        if self._begin is not None and version is not None:
            mean = self._sequences / self._steps
            self._intervals.append(EngineInterval(0, "sample", version, self._begin, time.time(), mean))
        self._begin, self._steps, self._sequences = None, 0, 0

    def take(self) -> list[EngineInterval]:
        """Those that are over; one that is not is reported when it is."""
        intervals, self._intervals = self._intervals, []
        return intervals
