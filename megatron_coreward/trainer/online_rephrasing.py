"""Rephrasings that the policy or the teacher writes itself for every step (`data.online_rephrasing`).

The model is asked to rewrite the questions of a step; a rewriting that passes the filter (`data.rephrasing`) is the
question's other view in this step. One that does not leaves the rephrasing of the files, or the question itself if
there are no files.

The rewritings of a step begin when the rollouts of the step before are complete, on engines that hold the weights that
drew those, and are written while the actors learn. So nobody waits for them, and the weights that write them are those
of the step before. A step whose rewritings could not begin then has them written at its beginning, with its own
weights: the first of an attempt; one whose rewritings were lost with an engine; every step if the engines sleep while
the actors learn (colocated placement), or hold the policy then and the teacher is to write.

Invariants (tests/trainer/test_online_rephrasing.py):
  1. What is rewritten is a function of weights, questions and seeds. Under `rollout.schedule: deterministic` nothing
     begins before a checkpoint for the step after it: a run that goes on from there asks for what an uninterrupted one
     asked for, from the same weights, and gets the same.
  2. A step in the rollout log is trained on the texts that it was drawn for, and nothing is rewritten for it. What the
     step after it needs is.
  3. Ground truths are not looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from megatron_coreward.cluster.weight_sync import SyncReport
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.parquet import Message
from megatron_coreward.data.prompts import Tokenizer, build_prompts, with_system_prompt
from megatron_coreward.data.rephrasing import check, parse_reply, rewriting_prompt
from megatron_coreward.data.rewriting_prompts import PROMPTS
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.experience import Rollouts, RolloutSource
from megatron_coreward.trainer.sampling import request_seed
from megatron_coreward.types import Completion, Problem, Prompt, Role

T = TypeVar("T")

HOW = PROMPTS["own"]  # is asked and read


class AskedEngines(Protocol):
    """What rewriting needs of the engines (`cluster.rollout_engines.RolloutEngines`)."""

    @property
    def shared(self) -> bool: ...
    @property
    def epoch(self) -> int: ...
    def run(self, ask: Callable[[], T], timer: PhaseTimer) -> T: ...
    def sync_weights(self, role: Role, num_updates: int, timer: PhaseTimer) -> int: ...
    def begin_sampling(
        self, requests: Sequence[SamplingRequest], expected_version: int
    ) -> Callable[[], list[list[Completion]]]: ...
    def take_syncs(self) -> list[SyncReport]: ...


@dataclass(frozen=True, slots=True)
class Rewriting:
    """Who rewrites which questions."""

    role: Role
    engines: AskedEngines
    tokenizer: Tokenizer
    questions: Mapping[str, Sequence[Message]]  # uid -> conversation; its last message is the question


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The rewritings of a step that engines are writing."""

    step: int
    epoch: int  # of the engines: those of an engine that has died since will not come
    requests: Mapping[str, SamplingRequest]  # by uid
    finish: Callable[[], list[list[Completion]]]


@dataclass(slots=True)
class Rewriter:
    """The problems of a run, those of the step at hand with rephrasings of the model's own."""

    config: RunConfig
    by: Rewriting
    given: Callable[[int], Sequence[Problem]]  # the batch of a step, counted from 0
    logged: Callable[[int], bool] = lambda step: False  # whether a step's rollouts are in the rollout log
    _step: int = 0  # that was rewritten last
    _written: dict[str, Prompt] = field(default_factory=dict)  # for it, by uid
    _in_flight: _InFlight | None = None  # that were begun last

    def problems_of(self, step: int) -> Sequence[Problem]:
        """The batch of a step, counted from 0, as its rollouts are drawn."""
        problems = self.given(step)
        if step + 1 != self._step:
            return problems
        return [
            replace(problem, prompts={**problem.prompts, "rephrased": self._written[problem.uid]})
            if problem.uid in self._written
            else problem
            for problem in problems
        ]

    def rewrite(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Rewrites the questions of a step, counted from 1: takes what was begun for it, or asks now, with the weights
        of the moment."""
        self._step, self._written = step, {}
        ahead = self._in_flight if self._in_flight is not None and self._in_flight.step == step else None
        requests = self._requests(step) if ahead is None else ahead.requests
        if not requests:
            return

        def take() -> list[list[Completion]]:
            begun = ahead
            if begun is None or begun.epoch != self.by.engines.epoch:
                begun = self._begin(step, requests, num_updates, timer)
            with timer.phase("rephrasing"):
                return begun.finish()

        replies = self.by.engines.run(take, timer)
        self._written = self._accepted({uid: reply for uid, (reply,) in zip(requests, replies, strict=True)})

    def begin(self, step: int, num_updates: int, timer: PhaseTimer) -> None:
        """Lets the engines begin with the questions of a step, with the weights of the moment, if that may be while the
        step before it is at hand."""
        requests = self._requests(step) if self._may_begin(step) else {}
        if not requests:
            return

        def ask() -> None:
            self._in_flight = self._begin(step, requests, num_updates, timer)

        self.by.engines.run(ask, timer)

    def _may_begin(self, step: int) -> bool:
        """Whether a step may be rewritten while the actors learn from the one before it."""
        rollout, every = self.config.rollout, self.config.checkpoint.every
        if rollout.placement == "colocated" or (self.by.role == "teacher" and self.by.engines.shared):
            return False
        after_checkpoint = every > 0 and (step - 1) % every == 0
        return step <= self.config.steps and not (after_checkpoint and rollout.schedule == "deterministic")

    def _begin(
        self, step: int, requests: Mapping[str, SamplingRequest], num_updates: int, timer: PhaseTimer
    ) -> _InFlight:
        version = self.by.engines.sync_weights(self.by.role, num_updates, timer)
        finish = self.by.engines.begin_sampling(list(requests.values()), version)
        return _InFlight(step, self.by.engines.epoch, requests, finish)

    def _requests(self, step: int) -> dict[str, SamplingRequest]:
        """For the questions of a step that leave room for a reply, by uid; none for a step in the rollout log."""
        if self.logged(step):
            return {}
        uids = [problem.uid for problem in self.given(step - 1)]
        asked = build_prompts(
            self.by.tokenizer, [rewriting_prompt(self._question(uid)) for uid in uids], self.config.data.thinking
        )
        longest = self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens
        return {
            uid: SamplingRequest(
                prompt=prompt.token_ids,
                n=1,
                seed=request_seed(self.config.seed, step, f"{uid}/rewriting", "rephrased", self.by.role),
                temperature=HOW.temperature,
                top_p=HOW.top_p,
                max_tokens=min(HOW.max_tokens, longest - len(prompt.token_ids)),
                logprobs=False,
            )
            for uid, prompt in zip(uids, asked, strict=True)
            if len(prompt.token_ids) < longest
        }

    def _accepted(self, replies: Mapping[str, Completion]) -> dict[str, Prompt]:
        """The prompts of the rewritings that pass the filter and fit."""
        conversations: dict[str, tuple[Message, ...]] = {}
        for uid, reply in replies.items():
            text, _ = parse_reply(reply.text)
            if text is None or reply.finish_reason != "stop" or not check(self._question(uid), text).passed:
                continue
            messages = (*self.by.questions[uid][:-1], Message(role="user", content=text))
            conversations[uid] = with_system_prompt(messages, self.config.data.system_prompt)
        if not conversations:
            return {}
        # What a model wrote has no control tokens, whatever its text says.
        prompts = build_prompts(self.by.tokenizer, list(conversations.values()), self.config.data.thinking)
        return {
            uid: prompt
            for uid, prompt in zip(conversations, prompts, strict=True)
            if len(prompt.token_ids) <= self.config.data.max_prompt_tokens
        }

    def _question(self, uid: str) -> str:
        return self.by.questions[uid][-1]["content"]

    def metrics(self) -> dict[str, float]:
        """How many of the questions that were rewritten last have a rephrasing of the model's own."""
        count = len(self.given(self._step - 1)) if self._step else 0
        return {} if not count or self.logged(self._step) else {"rollout/rewritten_share": len(self._written) / count}


@dataclass(frozen=True, slots=True)
class RephrasedSource:
    """A rollout source whose questions are rewritten before they are asked, those of the next step meanwhile."""

    source: RolloutSource
    rewriter: Rewriter

    def sample(self, step: int, num_updates: int, timer: PhaseTimer) -> Rollouts:
        """See `RolloutSource`."""
        self.rewriter.rewrite(step, num_updates, timer)
        rollouts = self.source.sample(step, num_updates, timer)
        self.rewriter.begin(step + 1, num_updates, timer)
        return replace(rollouts, syncs=[*rollouts.syncs, *self.rewriter.by.engines.take_syncs()])
