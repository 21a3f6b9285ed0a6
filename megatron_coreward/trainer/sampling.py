"""Questions in, groups of completions out: the requests to the engines, with a seed for each."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from megatron_coreward.config.schema import AnswerFormat, RunConfig
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.types import Completion, Problem, Role, RolloutGroup, View


class SamplingEngines(Protocol):
    """What sampling needs of the engines (`cluster.engine_group.EngineGroup`, `RolloutEngines`)."""

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]: ...


def request_seed(run_seed: int, step: int, uid: str, view: View, role: Role) -> int:
    """A function of what is sampled alone, so that a resumed or repeated run draws the same completions."""
    name = f"{run_seed}/{step}/{uid}/{view}/{role}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


def sample_groups(
    engines: SamplingEngines,
    problems: Sequence[Problem],
    views: Sequence[View],
    role: Role,
    *,
    n: int,
    temperature: float,
    max_tokens: int,
    version: int,
    step: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    answer_formats: Sequence[AnswerFormat] = ("boxed",),
    stop_at: Sequence[str] = (),
    stop: Sequence[str] = (),
) -> list[RolloutGroup]:
    """`n` completions for every view of every problem: one group each, problem after problem. Without log-probs."""
    requests = requests_for(
        problems,
        views,
        role,
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        step=step,
        seed=seed,
        top_p=top_p,
        top_k=top_k,
        answer_formats=answer_formats,
        stop_at=stop_at,
        stop=stop,
        logprobs=False,
    )
    return to_groups(problems, views, role, engines.sample(requests, version))


def requests_for(
    problems: Sequence[Problem],
    views: Sequence[View],
    role: Role,
    *,
    n: int,
    temperature: float,
    max_tokens: int,
    step: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    answer_formats: Sequence[AnswerFormat] = (),
    stop_at: Sequence[str] = (),
    stop: Sequence[str] = (),
    logprobs: bool = True,
) -> list[SamplingRequest]:
    """One request for every view of every problem, problem after problem."""
    return [
        SamplingRequest(
            prompt=problem.prompts[view].token_ids,
            n=n,
            seed=request_seed(seed, step, problem.uid, view, role),
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            answer_formats=answer_formats,
            stop_at=stop_at,
            stop=stop,
            top_k=top_k,
            logprobs=logprobs,
        )
        for problem in problems
        for view in views
    ]


def step_requests(
    config: RunConfig, role: Role, views: Sequence[View], step: int, problems: Sequence[Problem]
) -> list[SamplingRequest]:
    """What a role samples for the problems of a step. The teacher only votes: nobody reads its log-probs, and it votes
    with the whole distribution."""
    policy = role == "policy"
    return requests_for(
        problems,
        views,
        role,
        n=config.teacher.n if role == "teacher" else config.rollout.num_samples,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p if policy else 1.0,
        top_k=config.rollout.top_k if policy else 0,
        max_tokens=config.rollout.max_response_tokens,
        step=step,
        seed=config.seed,
        answer_formats=config.rewards.answer_formats,
        stop_at=config.rewards.stop_at,
        stop=config.rollout.stop,
        logprobs=policy,
    )


def to_groups(
    problems: Sequence[Problem], views: Sequence[View], role: Role, completions: Sequence[Sequence[Completion]]
) -> list[RolloutGroup]:
    """What the engines made of the requests of `requests_for`, as one group a request."""
    asked = [(problem, view) for problem in problems for view in views]
    return [
        RolloutGroup(problem.uid, view, role, problem.prompts[view], tuple(of_request))
        for (problem, view), of_request in zip(asked, completions, strict=True)
    ]
