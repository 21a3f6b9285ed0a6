r"""Surface normalisation of LaTeX answers: the many spellings of one value become one string.

Invariants: pure and deterministic; an answer longer than `MAX_LENGTH` or nested deeper than `MAX_DEPTH` is not looked
into, so the cost of one answer is bounded; numbers are exact (`fractions.Fraction`), never floats; what is left of an
expression is still valid LaTeX.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

MAX_LENGTH = 1000  # characters; no final answer that means anything is longer
MAX_DEPTH = 30  # brackets open at once; what is nested deeper is no answer, and parsing it takes seconds
MAX_EXPONENT = 1000  # of powers and scientific notation that are evaluated; also a bound on the digits of a power

Kind = Literal["number", "numbers", "point", "word", "scalar", "plural", "expression", "opaque"]


@dataclass(frozen=True, slots=True)
class CanonicalAnswer:
    """An answer in normal form; two of the same `text` are equivalent.

    kind: `number` a rational; `numbers` an unordered list or set of rationals; `point` rationals in brackets (a tuple
    or an interval); `word` plain text or a choice; `scalar` another expression with one value; `plural` another list,
    set, tuple, interval, union or matrix; `opaque` too long or nested too deep to look into; `expression` everything
    else.
    """

    text: str
    kind: Kind

    def may_equal(self, other: "CanonicalAnswer") -> bool:
        """Whether mathematics could still equate two forms of different text, or the forms alone rule it out."""
        kinds = {self.kind, other.kind}
        if kinds & {"word", "opaque"} or (kinds & _ONE_VALUE and kinds & _SEVERAL_VALUES):
            return False
        if kinds == {"point"}:  # in other brackets the same numbers may be a tuple again
            return (self.text[0], self.text[-1]) != (other.text[0], other.text[-1])
        return kinds not in ({"number"}, {"numbers"})


_ONE_VALUE = frozenset({"number", "scalar"})
_SEVERAL_VALUES = frozenset({"numbers", "point", "plural"})


def canonical(answer: str) -> CanonicalAnswer:
    r"""The normal form of an extracted answer.

    Of one form are `\dfrac12`, `\frac{1}{2}`, `1/2`, `0.50`, `x = .5` and `$0.5$.`; `1,000` and `1{,}000`; `90^\circ`
    and `90`; `50\%` and `50`; `5\text{ cm}` and `5`; `\text{(C)}` and `C`; `(1, 2.0)` and `\left(1,2\right)`; `1, 2`
    and `\{2,1\}`. The question fixes the unit, the percent and currency sign and the name on the left of a lone equals
    sign, so these are dropped. `a,bcd` is read as one number with a thousands separator, `a, bcd` as two numbers.
    """
    # Not remembered: a memory of megabyte answers would be gigabytes.
    return CanonicalAnswer(answer.strip(), "opaque") if len(answer) > MAX_LENGTH else _canonical(answer)


@lru_cache(maxsize=8192)
def _canonical(answer: str) -> CanonicalAnswer:
    text = _collapse(answer.translate(_SYMBOLS))
    for pattern, replacement in _CLEANUP:
        text = pattern.sub(replacement, text)
    text = _drop_unit(_collapse(text).rstrip(_PUNCTUATION)).rstrip(_PUNCTUATION)
    text = _ASSIGNMENT.sub("", text, count=1).strip()
    text = _join_digit_groups(text)
    text = _brace_arguments(_squeeze(text))
    text = _DECIMAL_FRACTION.sub(lambda match: _trim_decimal(match[0]), _SLASH.sub(r"\\frac{\1}{\2}", text))
    while text.startswith("{") and _closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    return _classify(text.removeprefix("+")) if text else CanonicalAnswer(answer.strip(), "opaque")


def as_number(text: str) -> Fraction | None:
    r"""The exact value of a plain number in normal form; None for everything else.

    Read are integers, decimals, `1.5e3`, `1.5\times10^{3}`, `a/b`, `\frac{a}{b}`, mixed numbers (`1\frac{1}{2}` is 3/2)
    and powers of integers. Division by zero, exponents beyond `MAX_EXPONENT` and longer powers are no plain numbers.
    """
    sign, body = (-1, text[1:]) if text.startswith("-") else (1, text)
    if match := _DECIMAL.fullmatch(body):
        return sign * Fraction(body) if abs(int(match[1] or 0)) <= MAX_EXPONENT else None
    if match := _MIXED.fullmatch(body):
        part = as_number(match[2])
        return sign * (int(match[1]) + part) if part is not None else None
    if match := _FRACTION.fullmatch(body):
        above, below = (Fraction(numeral) for numeral in match.groups() if numeral is not None)
        return sign * above / below if below else None
    if match := _POWER.fullmatch(body):
        factor, base, exponent = Fraction(match[1] or 1), int(match[2]), int(match[3])
        if len(match[2]) * abs(exponent) > MAX_EXPONENT or (base == 0 and exponent <= 0):
            return None
        return sign * factor * Fraction(base) ** exponent
    return None


_NUMERAL = r"(?:\d+\.?\d*|\.\d+)"
_DECIMAL = re.compile(rf"{_NUMERAL}(?:[eE]([+-]?\d{{1,4}}))?", re.ASCII)
_FRACTION = re.compile(rf"\\frac\{{(-?{_NUMERAL})\}}\{{(-?{_NUMERAL})\}}|(-?{_NUMERAL})/(-?{_NUMERAL})", re.ASCII)
_MIXED = re.compile(r"(\d+) ?(\\frac\{\d+\}\{\d+\})", re.ASCII)
_POWER = re.compile(r"(?:(\d+\.?\d*)(?:\\times|\\cdot))?(\d+)\^\{(-?\d{1,4})\}", re.ASCII)

_PUNCTUATION = ".,;: "
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"),
        **{"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "√": r"\sqrt ", "°": r"^\circ ", "π": r"\pi ", "％": "%"},
        **{"∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    }
)
_CLEANUP = tuple(
    (re.compile(pattern, re.ASCII), replacement)
    for pattern, replacement in (
        (r"\\?\$|(?<!\\)\\[()\[\]]", ""),  # currency, math delimiters
        (r"\{,\}", ","),
        (r"(?<=\d)(?:,?\s*(?<!\\)\\[,!;: ]|~)\s*(?=\d{3}(?!\d))", ""),  # 1,\!000 and 1\,000
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\(?:display|text)style(?![A-Za-z])", " "),
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[bB]igg?[lrm]?(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
        (r"\s*\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![A-Za-z]))|\\degree(?![A-Za-z])", " "),
        (r"\\?%", " "),
    )
)

_TEXT_MACRO = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox)\s*"
_TEXT = re.compile(_TEXT_MACRO + r"\{([^{}]*)\}")
_POWER_OF_UNIT = r"(?:\s*\^\s*(?:[23]|\{[23]\}))?"
_TRAILING_TEXT = re.compile(_TEXT_MACRO + r"\{([A-Za-z. /-]+)\}" + _POWER_OF_UNIT + "$")
_NO_UNITS = frozenset(  # change what a number says
    {"am", "pm", "a.m.", "p.m.", "or", "and", "to", "mod", "base"}
    | {"dozen", "hundred", "thousand", "million", "billion", "trillion"}
)
_UNIT_WORDS = (
    "degrees?|percent|dollars?|cents?|units?|points?|square|cubic|sq|mm|cm|km|meters?|metres?|centimeters?|kilometers?|"
    "inch|inches|ft|foot|feet|yards?|miles?|mph|kg|grams?|kilograms?|pounds?|lbs?|ounces?|oz|liters?|litres?|gallons?|"
    "seconds?|minutes?|hours?|days?|weeks?|months?|years?"
)
_PLAIN_UNIT = re.compile(rf"(?<=[\d}}) ])(?:{_UNIT_WORDS})\.?{_POWER_OF_UNIT}$")
_CONJUNCTION = re.compile(r",? (?:and|or) ")
_ASSIGNMENT = re.compile(
    r"^(?:[A-Za-z]|\\[A-Za-z]+)\s*(?:_(?:\w|\{\w+\}))?\s*(?:\(\s*[A-Za-z]\s*\)\s*)?(?:=|\\in(?![A-Za-z]))(?=[^=<>]+$)"
)
_DIGIT_GROUPS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?", re.ASCII)
_SPACED_MIXED = re.compile(r"(-?\d+) +(\d+)/(\d+)", re.ASCII)

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.")
_BARE_SCRIPT = re.compile(r"([\^_])(-?\d+|[A-Za-z])", re.ASCII)
_BARE_ROOT = re.compile(r"\\sqrt(\[[^\]]*\])? ?(\d+|[A-Za-z])", re.ASCII)
_BARE_FIRST = re.compile(r"\\(frac|binom) ?(\d|[A-Za-z]|\\[A-Za-z]+(?![A-Za-z{]))", re.ASCII)
_BARE_SECOND = re.compile(r" ?(\d|[A-Za-z]|\\[A-Za-z]+(?![A-Za-z{]))", re.ASCII)
_SLASH = re.compile(r"(?<![\w.})])(-?\d+)/(\d+)(?![\w.{(\\^])", re.ASCII)
_DECIMAL_FRACTION = re.compile(r"(?<![\d.])\d*\.\d+(?!\.?\d)", re.ASCII)  # "1.000.000" is none

_BRACKET = re.compile(r"\\?[{}]|[()\[\],]")
_STEP = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
# Numbers and names under operations and functions that make one value of them.
_SCALAR = re.compile(
    r"(?:[ 0-9A-Za-z+\-*/^_{}().!]|\\(?:frac|binom|sqrt|cdot|times|pi|theta|phi|alpha|beta|lambda|omega|"
    r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log)(?![A-Za-z]))+",
    re.ASCII,
)
_CHOICE = re.compile(r"\(([A-Z])\)|([A-Z])")  # of a multiple-choice question
_WORD = re.compile(r"[A-Za-z]{3,}|no", re.IGNORECASE | re.ASCII)  # one or two letters are variables


def _collapse(text: str) -> str:
    """With single spaces for white space of every kind, and none at the ends."""
    return " ".join(text.split())


def _drop_unit(text: str) -> str:
    """Without the unit at the end (text after a number, or a plain unit word) and without text macros."""
    trailing = _TRAILING_TEXT.search(text)
    if trailing and not _NO_UNITS & set(trailing[1].lower().split()):
        head = text[: trailing.start()]
        text = head if any(char.isdigit() for char in head) else text
    while (unwrapped := _TEXT.sub(r" \1 ", text)) != text:  # the innermost macros first
        text = unwrapped
    text = _CONJUNCTION.sub(", ", _collapse(text))
    while (bare := _PLAIN_UNIT.sub("", text).rstrip()) != text:  # "square feet" goes in two steps
        text = bare
    return text


def _join_digit_groups(text: str) -> str:
    """A lone number without its thousands separators; a mixed number with a fraction instead of a slash."""
    if _DIGIT_GROUPS.fullmatch(text):
        return text.replace(",", "").replace(" ", "")
    if mixed := _SPACED_MIXED.fullmatch(text):
        return mixed.expand(r"\1\\frac{\2}{\3}")
    return text


def _squeeze(text: str) -> str:
    """Without white space, save where it keeps a command from a letter or a digit from a digit."""
    pieces: list[str] = []
    previous, spaced = "", False
    for token in _TOKEN.findall(text):
        if token.isspace():
            spaced = True
            continue
        after_command = previous.startswith("\\") and (previous[-1].isalpha() or previous == r"\\")
        if spaced and ((after_command and token.isalpha()) or (previous.isdigit() and token.isdigit())):
            pieces.append(" ")
        pieces.append(token)
        previous, spaced = token, False
    return "".join(pieces)


def _brace_arguments(text: str) -> str:
    r"""With braces around every argument of `\frac`, `\binom` and `\sqrt` and around every script."""
    text = _BARE_SCRIPT.sub(r"\1{\2}", text)
    text = _BARE_ROOT.sub(lambda match: rf"\sqrt{match[1] or ''}{{{match[2]}}}", text)
    text = _BARE_FIRST.sub(r"\\\1{\2}", text)
    for command in reversed(list(re.finditer(r"\\(?:frac|binom)\{", text))):
        end = _closing_brace(text, command.end() - 1) + 1
        if end and (second := _BARE_SECOND.match(text, end)):
            text = f"{text[:end]}{{{second[1]}}}{text[second.end() :]}"
    return text


def _closing_brace(text: str, opening: int) -> int:
    """Index of the brace that closes the one at `opening`; -1 where none does."""
    depth = 0
    for token in re.compile(r"\\.|[{}]").finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1


def _trim_decimal(numeral: str) -> str:
    whole, fraction = numeral.split(".")
    fraction = fraction.rstrip("0")
    return f"{whole or '0'}.{fraction}" if fraction else whole or "0"


def _classify(text: str) -> CanonicalAnswer:
    if choice := _CHOICE.fullmatch(text):
        return CanonicalAnswer(choice[1] or choice[2], "word")
    if _WORD.fullmatch(text):
        return CanonicalAnswer(text.casefold(), "word")
    if (number := as_number(text)) is not None:
        return CanonicalAnswer(str(number), "number")
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        if (numbers := _numbers(text[1:-1])) is not None:
            return CanonicalAnswer(f"{text[0]}{','.join(map(str, numbers))}{text[-1]}", "point")
    elif (numbers := _numbers(text.removeprefix(r"\{").removesuffix(r"\}"))) is not None:
        return CanonicalAnswer(",".join(map(str, sorted(numbers))), "numbers")
    if _depth(text) > MAX_DEPTH:
        return CanonicalAnswer(text, "opaque")
    if _SCALAR.fullmatch(text):
        return CanonicalAnswer(text, "scalar")
    return CanonicalAnswer(text, "plural" if _is_plural(text) else "expression")


def _depth(text: str) -> int:
    """How many brackets are open at once, at most; those that nothing closes count."""
    depth = deepest = 0
    for token in _BRACKET.finditer(text):
        depth += _STEP.get(token[0][-1], 0)
        deepest = max(deepest, depth)
    return deepest


def _is_plural(text: str) -> bool:
    r"""Whether an expression surely stands for several values: a list, a bracketed list, a union or a matrix."""
    if r"\pm" in text or r"\mp" in text or "=" in text:
        return False
    if r"\cup" in text or (text.startswith(r"\begin{") and text.endswith("}")):
        return True
    depth, commas, closed_early = 0, [], False  # commas: how deep each of them stands
    for token in _BRACKET.finditer(text):
        if token[0] == ",":
            commas.append(depth)
        depth += _STEP.get(token[0][-1], 0)
        closed_early |= depth == 0 and token.end() < len(text)
    return depth == 0 and (0 in commas or (1 in commas and not closed_early and text[0] in "([\\"))


def _numbers(text: str) -> list[Fraction] | None:
    """The members of a comma-separated list of two or more plain numbers; None for everything else."""
    numbers = [as_number(part) for part in text.split(",")]
    known = [number for number in numbers if number is not None]
    return known if len(known) == len(numbers) > 1 else None
