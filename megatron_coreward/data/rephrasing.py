r"""Rewriting a question: what is asked, what was replied, and when a rewriting is good enough. Pure.

Co-rewarding-I rewards answers to a question by answers to its rephrasing, so a rephrasing whose mathematics differs
teaches wrong labels, and one that is a copy teaches nothing. A rewriting passes only if every check does:

| check | passes if |
|---|---|
| `numbers` | every number of the original is in the rewriting, by value; those up to 3 may become words |
| `new_numbers` | it brings no number that the original lacks, except whole numbers up to 3 |
| `not_a_copy` | it shares at most `MAX_SIMILARITY` of its word trigrams, formulas aside, with the original |
| `no_answer` | no \boxed, and no "the answer is", except the form that it is asked in |
| `length` | between 0.4 and 6 times as long, and at least 12 characters |
| `formulas` | its dollar signs and braces are balanced |

Numbers are read in digits and, outside of formulas, in English words (`data.numerals`), and compared by value, not by
how often they stand. `153,370,371,407` may be one number or a list of four: either reading will do. Ground truths are
not looked at: which questions are trained on must not depend on them.
Figures ([asy] code) are left out of numbers and lengths: a rewriting may draw or describe them in its own way.
The filter is strict: "one and a half times" for "50% longer" is refused. What it lets through can still be wrong; a
solver's majorities on both versions (`evaluation.rephrase`) are the stronger check, and cost samples.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from megatron_coreward.data.numerals import NumberLists, number_lists, spoken_numbers, written_numbers
from megatron_coreward.data.parquet import Message
from megatron_coreward.data.rewriting_prompts import PROMPTS, Parsed, PromptName

MAX_SIMILARITY = 0.5
SHORTEST, LENGTH_RATIO = 12, (0.4, 6.0)  # characters; rewriting against original
SMALL = frozenset(map(Fraction, range(4)))  # numbers that a rewriting may bring

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_FIGURE = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\[asy\].*?\[/asy\]", re.DOTALL)
# "The answer is in the form a/b" says how to answer, not what.
_ASKED_FORM = (
    r"(?!\s+(?:(?:to|be|always|then|expressed|given|written|stated|required|wanted|left)\s+){0,3}"
    r"(?:in|of)\s+(?:the|a|an|this|its)\s+(?:[a-z]+\s+){0,2}form\b)"
)
_ANSWER = re.compile(
    rf"\\boxed|\bthe (?:final )?answer is\b{_ASKED_FORM}|</?rewritten>|### RESULT_(?:START|END)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class FilterResult:
    """What the checks said of a rewriting."""

    checks: Mapping[str, bool]
    similarity: float  # share of trigrams in common, in [0, 1]

    @property
    def passed(self) -> bool:
        return all(self.checks.values())

    @property
    def failures(self) -> list[str]:
        return [name for name, passed in self.checks.items() if not passed]


def rewriting_prompt(question: str, prompt: PromptName = "own") -> tuple[Message, ...]:
    """The conversation that asks for a rewriting."""
    return (Message(role="user", content=PROMPTS[prompt].ask(question)),)


def parse_reply(reply: str, prompt: PromptName = "own") -> Parsed:
    """(rewriting, "") or (None, why it was refused)."""
    return PROMPTS[prompt].parse(reply)


def numbers(text: str) -> set[Fraction]:
    """The numbers of a text, by value: in digits, and outside of formulas in English words."""
    text = _FIGURE.sub(" ", text)
    return written_numbers(text) | spoken_numbers(_FORMULA.sub(" ", text))


def similarity(one: str, other: str) -> float:
    """Jaccard index of the word trigrams outside of formulas; of the words themselves if there are fewer than 6."""
    first, second = ([w.lower() for w in _WORD.findall(_FORMULA.sub(" ", text))] for text in (one, other))
    size = 3 if min(len(first), len(second)) >= 6 else 1
    a, b = ({tuple(words[i : i + size]) for i in range(len(words) - size + 1)} for words in (first, second))
    if not a and not b:
        return float("".join(one.split()) == "".join(other.split()))
    return len(a & b) / len(a | b)


def check(original: str, rewriting: str) -> FilterResult:
    """The quality filter; see the table above."""
    old, new = numbers(original), numbers(rewriting)
    old_lists, new_lists = (number_lists(_FIGURE.sub(" ", text)) for text in (original, rewriting))
    alike = similarity(original, rewriting)
    ratio = len(_FIGURE.sub("", rewriting)) / max(1, len(_FIGURE.sub("", original)))
    return FilterResult(
        {
            "numbers": _covered(old - SMALL, old_lists, new, new_lists) and _digits_kept(old, new),
            "new_numbers": _covered(new - SMALL, new_lists, old | SMALL, old_lists),
            "not_a_copy": alike <= MAX_SIMILARITY,
            "no_answer": _ANSWER.search(rewriting) is None,
            "length": len(rewriting) >= SHORTEST and LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1],
            "formulas": _balanced(rewriting) or not _balanced(original),
        },
        alike,
    )


def _covered(values: set[Fraction], lists: NumberLists, others: set[Fraction], other_lists: NumberLists) -> bool:
    """Whether each value is among the others; what may be a list, on either side, counts as its members too."""
    known = others.union(*other_lists.values())
    return all(value in known or (value in lists and lists[value] <= known) for value in values)


def _digits_kept(old: set[Fraction], new: set[Fraction]) -> bool:
    """Small numbers may change places with words that are not read (once, a pair), but not all of them may go."""
    small = old & SMALL
    return not small or bool(small & new) or bool(old - SMALL)


def _balanced(text: str) -> bool:
    depth = 0
    for character in re.sub(r"\\.", "", text, flags=re.DOTALL):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and re.sub(r"\\.", "", text, flags=re.DOTALL).count("$") % 2 == 0
