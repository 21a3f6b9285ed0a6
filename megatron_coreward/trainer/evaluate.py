"""Validation on held-out questions with gold answers: pass@1, avg@k, maj@k."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_coreward.config.schema import ValidationSettings
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rewards.voting import majority_vote
from megatron_coreward.trainer.sampling import SamplingEngines, sample_groups
from megatron_coreward.types import Problem, RolloutGroup

GREEDY = 0.0


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of Q questions."""

    pass_at_1: float  # the most likely answer is right
    avg_at_k: float  # mean over k samples a question
    maj_at_k: float  # the majority of k samples is right
    k: int
    num_problems: int

    def metrics(self) -> dict[str, float]:
        return {"val/pass@1": self.pass_at_1, f"val/avg@{self.k}": self.avg_at_k, f"val/maj@{self.k}": self.maj_at_k}


def evaluate(
    engines: SamplingEngines,
    problems: Sequence[Problem],
    settings: ValidationSettings,
    judge: Judge,
    *,
    max_tokens: int,
    version: int,
    seed: int,
) -> Accuracy:
    """Samples every problem once greedily and `settings.n` times at `settings.temperature`.

    The seeds are the same at every call, so that two evaluations differ by the weights alone.
    """

    def draw(n: int, temperature: float) -> list[RolloutGroup]:
        return sample_groups(
            engines,
            problems,
            ("original",),
            "policy",
            n=n,
            temperature=temperature,
            max_tokens=max_tokens,
            version=version,
            step=0,
            seed=seed,
        )

    def right(answers: Iterable[tuple[Problem, str | None]]) -> float:
        return float(np.mean([judge.equivalent(answer, problem.gold) for problem, answer in answers]))

    def each(groups: Sequence[RolloutGroup]) -> Iterable[tuple[Problem, str | None]]:
        return ((p, answer) for p, group in zip(problems, groups, strict=True) for answer in group.answers)

    sampled = draw(settings.n, settings.temperature)
    majorities = [majority_vote(group.answers, judge).label for group in sampled]
    return Accuracy(
        pass_at_1=right(each(draw(1, GREEDY))),
        avg_at_k=right(each(sampled)),
        maj_at_k=right(zip(problems, majorities, strict=True)),
        k=settings.n,
        num_problems=len(problems),
    )
