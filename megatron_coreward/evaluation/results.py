"""The result of an evaluation: one JSON file that says everything, and what is read from it (tables, comparisons).

Shares are in 0..1. `compare` pairs two results question by question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_coreward.algorithms.accuracy import (
    Estimate,
    Float64Array,
    PairedDifference,
    compare_paired,
    estimates,
    sampled_scores,
)
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.json_files import read_json, write_json

FORMAT = 1
FILE_NAME = "result.json"


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """One question: what was answered and what it was worth."""

    uid: str
    source: str
    question: str  # the prompt as the model saw it
    ground_truth: str | None
    greedy: str | None  # the most likely answer; None: none was found, or it was not drawn
    greedy_right: bool | None  # None: it was not drawn
    answers: tuple[str | None, ...]  # [n]
    right: tuple[bool, ...]  # [n]
    majority: str | None
    majority_right: bool
    truncated: int  # samples that were cut off at the length limit


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """A model on a set of questions."""

    model: str
    identity: Mapping[str, Any]  # fingerprint of model and data, sampling settings
    grading: Mapping[str, Any]  # equivalence, forms of answers
    questions: tuple[QuestionResult, ...]  # at least one

    def scores(self, source: str | None = None) -> dict[str, Float64Array]:
        """Scores [Q] by metric, of all questions or of one source; see `algorithms.accuracy.sampled_scores`."""
        chosen = [q for q in self.questions if source in (None, q.source)]
        greedy = [q.greedy_right for q in chosen if q.greedy_right is not None]
        return sampled_scores(
            [q.right for q in chosen],
            [q.majority_right for q in chosen],
            greedy if len(greedy) == len(chosen) else None,
        )

    @property
    def sources(self) -> list[str]:
        """In order of first sight."""
        return list(dict.fromkeys(q.source for q in self.questions))

    def metrics(self, source: str | None = None) -> dict[str, Estimate]:
        """Each metric with its 95% interval over questions."""
        return estimates(self.scores(source))

    @property
    def no_answer_share(self) -> float:
        """Of all samples."""
        return _share([answer is None for q in self.questions for answer in q.answers])

    @property
    def truncated_share(self) -> float:
        """Of all samples."""
        return sum(q.truncated for q in self.questions) / sum(len(q.answers) for q in self.questions)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def write_result(path: Path, result: EvaluationResult) -> None:
    """Writes the JSON file, whole or not at all: metrics first, then every question."""
    content = {
        "format": FORMAT,
        "model": result.model,
        "num_questions": len(result.questions),
        "metrics": {name: asdict(estimate) for name, estimate in result.metrics().items()},
        "by_source": {
            source: {name: asdict(estimate) for name, estimate in result.metrics(source).items()}
            for source in result.sources
        },
        "no_answer_share": result.no_answer_share,
        "truncated_share": result.truncated_share,
        "grading": dict(result.grading),
        "identity": dict(result.identity),
        "questions": [asdict(question) for question in result.questions],
    }
    write_json(path, content)


def read_result(path: Path) -> EvaluationResult:
    """Reads a result file, or the one in a folder. Raises InputError if it is missing or of another form."""
    return read_json(path, FILE_NAME, "result of an evaluation", FORMAT, _from_json)


def _from_json(content: Mapping[str, Any]) -> EvaluationResult:
    questions = tuple(
        QuestionResult(**{**row, "answers": tuple(row["answers"]), "right": tuple(row["right"])})
        for row in content["questions"]
    )
    grading = content["grading"] if "grading" in content else content["judging"]  # its name in earlier files
    result = EvaluationResult(content["model"], content["identity"], grading, questions)
    result.scores()  # raises ValueError if the samples of the questions differ in number
    return result


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A on the questions that both answered."""

    names: tuple[str, str]
    metrics: Mapping[str, tuple[float, float, PairedDifference]]  # by metric: mean of A, mean of B, B - A
    num_only_one: int  # questions that only one of the results has; they do not count
    differing_settings: Mapping[str, tuple[Any, Any]]  # what else differs between the evaluations, of A and of B


def compare(a: EvaluationResult, b: EvaluationResult) -> Comparison:
    """Pairs two results by question. Raises InputError if they share no question or no metric."""
    by_uid = [{q.uid: q for q in result.questions} for result in (a, b)]
    shared = [uid for uid in by_uid[0] if uid in by_uid[1]]
    other = [uid for uid in shared if by_uid[0][uid].ground_truth != by_uid[1][uid].ground_truth]
    if other:
        ground_truths = [questions[other[0]].ground_truth for questions in by_uid]
        raise InputError(
            f"question {other[0]} has the answer {ground_truths[0]!r} in one result and {ground_truths[1]!r} in the "
            "other: they are not one data set"
        )
    if not shared:
        raise InputError("the two results have no question in common; allowed: evaluations on the same data")
    scores = [
        EvaluationResult(r.model, r.identity, r.grading, tuple(questions[uid] for uid in shared)).scores()
        for r, questions in zip((a, b), by_uid, strict=True)
    ]
    common = [name for name in scores[0] if name in scores[1]]
    if not common:
        raise InputError(f"the two results have no metric in common: {', '.join(scores[0])} and {', '.join(scores[1])}")
    settings = [{**r.grading, **r.identity.get("sampling", {})} for r in (a, b)]
    return Comparison(
        names=(a.model, b.model),
        metrics={
            name: (
                float(scores[0][name].mean()),
                float(scores[1][name].mean()),
                compare_paired(scores[0][name], scores[1][name]),
            )
            for name in common
        },
        num_only_one=len(by_uid[0].keys() ^ by_uid[1].keys()),
        differing_settings={
            key: (settings[0].get(key), settings[1].get(key))
            for key in dict.fromkeys((*settings[0], *settings[1]))
            if settings[0].get(key) != settings[1].get(key)
        },
    )


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """As plain JSON."""
    return {
        "a": comparison.names[0],
        "b": comparison.names[1],
        "metrics": {
            name: {"a": a, "b": b, **asdict(difference)} for name, (a, b, difference) in comparison.metrics.items()
        },
        "num_only_one": comparison.num_only_one,
        "differing_settings": {key: list(pair) for key, pair in comparison.differing_settings.items()},
    }


def result_table(result: EvaluationResult) -> Table:
    """Metrics with intervals, a column a source if there are several."""
    table = Table(
        title=f"{result.model}: {len(result.questions)} questions",
        caption=f"95% bootstrap intervals over questions; no answer {result.no_answer_share:.1%}, "
        f"cut off {result.truncated_share:.1%}",
    )
    table.add_column("metric")
    sources = result.sources if len(result.sources) > 1 else []
    columns = [result.metrics(), *(result.metrics(source) for source in sources)]
    for name in ("all", *sources):
        table.add_column(name, justify="right")
    for metric in columns[0]:
        table.add_row(metric, *(share_text(column[metric]) if metric in column else "" for column in columns))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A, B and the paired difference, in points of a hundred."""
    caption = "B - A in points; 95% bootstrap interval over questions; p of a sign-flip permutation test"
    if comparison.num_only_one:
        caption += f"; {comparison.num_only_one} questions are in one result only and do not count"
    for key, (first, second) in comparison.differing_settings.items():
        caption += f"; {key} differs: {first} and {second}"
    table = Table(title=f"A: {comparison.names[0]}\nB: {comparison.names[1]}", caption=caption)
    for name in ("metric", "A", "B", "B - A", "interval", "p", "better / worse / all"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric, (a, b, pair) in comparison.metrics.items():
        gap = pair.difference
        table.add_row(
            metric,
            f"{a:.1%}",
            f"{b:.1%}",
            f"{100 * gap.value:+.1f}",
            f"{100 * gap.low:+.1f} .. {100 * gap.high:+.1f}",
            p_text(pair.p_value),
            f"{pair.num_better} / {pair.num_worse} / {pair.num_questions}",
        )
    return table


def share_text(estimate: Estimate) -> str:
    """`52.3% (49.1 .. 55.6)`."""
    return f"{estimate.value:.1%} ({100 * estimate.low:.1f} .. {100 * estimate.high:.1f})"


def p_text(p_value: float) -> str:
    """`0.034`, `< 0.001`."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
