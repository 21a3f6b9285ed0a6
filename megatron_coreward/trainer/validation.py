"""Validation on held-out questions with ground truths: pass@1, avg@n, pass@n, maj@n, over all and for each data set."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from megatron_coreward.algorithms.accuracy import Float64Array, sampled_scores
from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.config.schema import AnswerFormat, RunConfig, ValidationSettings
from megatron_coreward.config.validate import score_names
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.scoring import score_answers
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.sampling import SamplingEngines, sample_groups
from megatron_coreward.types import Problem, RolloutGroup

GREEDY = 0.0


def validation_metrics(
    config: RunConfig,
    held_out: Mapping[str, Sequence[Problem]],
    engines: RolloutEngines,
    equivalence: AnswerEquivalence,
    num_updates: int,
    timer: PhaseTimer,
) -> dict[str, float]:
    """`val/...` of the policy after `num_updates` optimizer steps (`measure_accuracy`)."""

    def ask() -> dict[str, float]:
        version = engines.sync_weights("policy", num_updates, timer)
        with timer.phase("validation"):
            return measure_accuracy(
                engines,
                held_out,
                config.validation,
                equivalence,
                max_tokens=config.rollout.max_response_tokens,
                version=version,
                seed=config.seed,
                answer_formats=config.rewards.answer_formats,
                stop_at=config.rewards.stop_at,
                stop=config.rollout.stop,
            )

    return engines.run(ask, timer)


def measure_accuracy(
    engines: SamplingEngines,
    held_out: Mapping[str, Sequence[Problem]],
    settings: ValidationSettings,
    equivalence: AnswerEquivalence,
    *,
    max_tokens: int,
    version: int,
    seed: int,
    stop: Sequence[str] = (),
    answer_formats: Sequence[AnswerFormat] = ("boxed",),
    stop_at: Sequence[str] = (),
) -> dict[str, float]:
    """Samples every problem as `settings.samples` says: once greedily, `settings.n` times at `settings.temperature`.

    The seeds are the same at every call, so that two evaluations differ by the weights alone. A problem without a
    ground truth counts, and no answer to it is right.

    Args:
        held_out: data sets by their names.

    Returns:
        `val/<score>` over all questions and, if there are several data sets, `val/<name>/<score>` of each, for the
        scores of `score_names`.
    """
    problems = list(chain.from_iterable(held_out.values()))

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
            stop=stop,
            answer_formats=answer_formats,
            stop_at=stop_at,
        )

    greedy = None if settings.samples == "random" else draw(1, GREEDY)
    sampled = None if settings.samples == "greedy" else draw(settings.n, settings.temperature)
    scores = _scores(greedy, sampled, problems, settings, equivalence)
    return _by_data_set(scores, {name: len(part) for name, part in held_out.items()})


def _scores(
    greedy: Sequence[RolloutGroup] | None,
    sampled: Sequence[RolloutGroup] | None,
    problems: Sequence[Problem],
    settings: ValidationSettings,
    equivalence: AnswerEquivalence,
) -> dict[str, Float64Array]:
    """[problems] of each score, from the groups that were drawn."""
    likeliest = None
    if greedy is not None:
        _compare(equivalence, greedy, problems)
        likeliest = [
            equivalence.equivalent(group.answers[0], problem.ground_truth)
            for problem, group in zip(problems, greedy, strict=True)
        ]
    if sampled is None:
        return {"pass@1": np.asarray(likeliest, dtype=np.float64)}
    _compare(equivalence, sampled, problems)
    graded = [
        score_answers(group.answers, problem.ground_truth, equivalence)
        for problem, group in zip(problems, sampled, strict=True)
    ]
    scores = sampled_scores([g.right for g in graded], [g.majority_right for g in graded], likeliest)
    return {name: scores[name] for name in score_names(settings)}


def _by_data_set(scores: Mapping[str, Float64Array], sizes: Mapping[str, int]) -> dict[str, float]:
    """Means of scores [Q] over all questions and, if there are several data sets, over those of each."""
    metrics = {f"val/{name}": float(values.mean()) for name, values in scores.items()}
    if len(sizes) > 1:
        ends = np.cumsum(list(sizes.values()))[:-1]
        for name, values in scores.items():
            for source, own in zip(sizes, np.split(values, ends), strict=True):
                metrics[f"val/{source}/{name}"] = float(own.mean())
    return metrics


def _compare(equivalence: AnswerEquivalence, groups: Sequence[RolloutGroup], problems: Sequence[Problem]) -> None:
    """All comparisons together, before they are asked for one by one."""
    equivalence.compare(
        [(*group.answers, problem.ground_truth) for group, problem in zip(groups, problems, strict=True)]
    )
