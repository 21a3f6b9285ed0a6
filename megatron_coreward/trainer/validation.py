"""Validation on held-out questions with gold answers: pass@1, avg@k, maj@k."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_coreward.algorithms.accuracy import sampled_scores
from megatron_coreward.config.schema import AnswerFormat, ValidationSettings
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.scoring import score_answers
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
    equivalence: AnswerEquivalence,
    *,
    max_tokens: int,
    version: int,
    seed: int,
    answer_formats: Sequence[AnswerFormat] = ("boxed",),
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
            answer_formats=answer_formats,
        )

    graded_answers = [
        score_answers(group.answers, problem.ground_truth, equivalence)
        for problem, group in zip(problems, draw(settings.n, settings.temperature), strict=True)
    ]
    likeliest = [
        equivalence.equivalent(group.answers[0], problem.ground_truth)
        for problem, group in zip(problems, draw(1, GREEDY), strict=True)
    ]
    scores = sampled_scores(
        [graded.right for graded in graded_answers], [graded.majority_right for graded in graded_answers], likeliest
    )
    return Accuracy(
        pass_at_1=float(scores["pass@1"].mean()),
        avg_at_k=float(scores[f"avg@{settings.n}"].mean()),
        maj_at_k=float(scores[f"maj@{settings.n}"].mean()),
        k=settings.n,
        num_problems=len(problems),
    )
