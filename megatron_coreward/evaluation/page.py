"""Evaluations and comparisons as pages: one HTML file each, with nothing outside it and no script."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_coreward.evaluation.results import (
    Comparison,
    EvaluationResult,
    QuestionResult,
    p_text,
    share_text,
)
from megatron_coreward.telemetry.files import replaced_whole

SHOWN_QUESTIONS = 200  # of the table of questions; the JSON file has them all
SHOWN_CHARACTERS = 600

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid #e6e6e6;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{display:block}.yes{color:#00734f}.no{color:#b04a00}pre{white-space:pre-wrap;margin:0;font-size:.85rem}
dt{float:left;clear:left;width:14rem;color:#666}dd{margin-left:14.5rem;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#1b1b1b}td,th{border-color:#3a3a3a}
.yes{color:#4cc9a0}.no{color:#ff9e57}}
"""


def write_evaluation_page(path: Path, result: EvaluationResult) -> None:
    """Metrics with intervals, settings, and questions from the hardest to the easiest."""
    parts = [f"<p>{len(result.questions)} questions. Intervals: 95%, bootstrap over questions.</p>"]
    for source in (None, *(result.sources if len(result.sources) > 1 else ())):
        rows = [
            [escape(name), _interval(estimate.low, estimate.value, estimate.high, 0.0, 1.0), share_text(estimate)]
            for name, estimate in result.metrics(source).items()
        ]
        parts += [f"<h2>{escape(source or 'All questions')}</h2>", _table(("metric", "", "share"), rows, numeric=(2,))]
    facts = {
        "samples without an answer": f"{result.no_answer_share:.1%}",
        "samples that were cut off": f"{result.truncated_share:.1%}",
        **{name: str(value) for name, value in result.grading.items()},
        **{
            name: str(value)
            for group in result.identity.values()
            if isinstance(group, dict)
            for name, value in group.items()
        },
    }
    parts += ["<h2>How it was measured</h2>", _facts(facts)]
    hardest = sorted(result.questions, key=lambda question: sum(question.right) / len(question.right))
    shown = hardest[:: max(1, -(-len(hardest) // SHOWN_QUESTIONS))]
    parts += [
        f"<h2>{len(shown)} of the questions, the hardest first</h2>",
        _table(
            ("question", "ground truth", "right", "majority", "other answers"),
            [_question(q) for q in shown],
            numeric=(2,),
        ),
    ]
    _write(path, f"Evaluation of {result.model}", parts)


def write_comparison_page(path: Path, comparison: Comparison) -> None:
    """B against A, metric by metric."""
    span = max((max(abs(d.difference.low), abs(d.difference.high)) for _, _, d in comparison.metrics.values()))
    span = max(span, 0.01)
    rows = [
        [
            escape(name),
            f"{a:.1%}",
            f"{b:.1%}",
            f"{100 * pair.difference.value:+.1f}",
            _interval(pair.difference.low, pair.difference.value, pair.difference.high, -span, span),
            f"{100 * pair.difference.low:+.1f} .. {100 * pair.difference.high:+.1f}",
            escape(p_text(pair.p_value)),
            f"{pair.num_better} / {pair.num_worse} / {pair.num_questions}",
        ]
        for name, (a, b, pair) in comparison.metrics.items()
    ]
    facts = {"A": comparison.names[0], "B": comparison.names[1]}
    if comparison.num_only_one:
        facts["questions in one result only"] = f"{comparison.num_only_one}, not counted"
    facts |= {f"{key} differs": f"{a} and {b}" for key, (a, b) in comparison.differing_settings.items()}
    parts = [
        _facts(facts),
        "<p>Differences in points, on the same questions. Intervals: 95%, bootstrap over questions. p: two-sided "
        "sign-flip permutation test over questions.</p>",
        _table(
            ("metric", "A", "B", "B - A", "", "interval", "p", "better / worse / all"),
            rows,
            numeric=(1, 2, 3, 5, 6, 7),
        ),
    ]
    _write(path, "Comparison of two evaluations", parts)


def _question(question: QuestionResult) -> list[str]:
    others = [answer for answer in dict.fromkeys(question.answers) if answer != question.majority]
    majority = "none" if question.majority is None else question.majority
    return [
        f"<pre>{_text(question.question)}</pre>",
        _text(question.ground_truth or ""),
        f"{sum(question.right)}/{len(question.right)}",
        f'<span class="{"yes" if question.majority_right else "no"}">{_text(majority)}</span>',
        ", ".join(_text("none" if answer is None else answer) for answer in others),
    ]


def _text(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    return escape(cut.encode(errors="replace").decode())


def _interval(low: float, value: float, high: float, left: float, right: float) -> str:
    """A line from low to high with a dot at the value, on a scale from left to right; a mark at zero."""

    def x(share: float) -> float:
        return round(4 + 192 * (share - left) / (right - left), 1)

    zero = f'<line x1="{x(0)}" x2="{x(0)}" y1="2" y2="16" stroke="#999"/>' if left < 0 < right else ""
    return (
        f'<svg width="200" height="18" role="img" aria-label="{low:.3f} to {high:.3f}">'
        f'<line x1="4" x2="196" y1="9" y2="9" stroke="#ccc"/>{zero}'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="9" y2="9" stroke="#0072b2" stroke-width="4"/>'
        f'<circle cx="{x(value)}" cy="9" r="4" fill="#d55e00"/></svg>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag} class=n>{value}</{tag}>" if place in numeric else f"<{tag}>{value}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _facts(facts: dict[str, str]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()) + "</dl>"
    )


def _write(path: Path, title: str, parts: Sequence[str]) -> None:
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )
    with replaced_whole(path) as temporary:
        temporary.write_text(page)
