"""Numbers and expressions, with the unit or currency that they stand with."""

import re

from megatron_coreward.rewards.expression import Node, number
from megatron_coreward.rewards.expression_parser import Unreadable, read_expression
from megatron_coreward.rewards.kinds import Equation, Reading, Scalar
from megatron_coreward.rewards.latex import MAX_LENGTH
from megatron_coreward.rewards.listing import GROUPED
from megatron_coreward.rewards.units import Unit, read_unit
from megatron_coreward.rewards.wordings import NUMBER_WORDS

_PRICE = re.compile(r"([+-]?)\s*(?:\\text\{)?\s*(USD|EUR|GBP|JPY|INR|Rs)\.?\s*\}?\s*(?=[-+\d.\\(])")
_CURRENCY = re.compile(r"(?<![A-Za-z\\])(?:USD|EUR|GBP|JPY|INR) ")
_OPEN_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)(?![A-Za-z])[^()]*$")
_UNIT_START = re.compile(
    r"\\text\{|\\frac\{\s*\\text|\\mu|\^\{?\s*\\circ|\^\{?\s*\\text\{|\^\{?(?:th|st|nd|rd)\b|%|\\Omega|¢|\s(?=[A-Za-z°(\\])|"
    r"(?<=\d)(?=(?:th|st|nd|rd)$)"
)
_GLOSS = re.compile(r"\s*(?:\\text\{)?\s*\(\s*(?:\\text\{)?\s*([a-z]+)\s*\}?\s*\)\s*\}?\s*")
_SINGLE_LETTER = re.compile(r"\\text\{\s*([A-Za-z])\s*\}")
_SPACED_GROUPS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII)
_DOTTED = re.compile(r"(\d*\.\d*)\\dot\s*\{?\s*(\d)\s*\}?\s*(\d*)\s*\\dot\s*\{?\s*(\d)\s*\}?", re.ASCII)
_PARENTHESISED = re.compile(r"(\d+)\.\((\d+)\)", re.ASCII)


def scalar_of(text: str) -> Reading | None:
    if price := _PRICE.match(text):
        return _priced(price[2], f"{price[1]}{text[price.end() :]}".strip())
    if measured := _measured(text):
        return measured
    node = node_of(text)
    return Scalar(node, text=text) if node is not None else None


def _priced(currency: str, text: str) -> Reading | None:
    """`USD 5 per hour`: 5 dollars an hour."""
    value = scalar_of(text)
    unit = read_unit(currency, plain=False)
    if not isinstance(value, Scalar) or unit is None:
        return None
    others = tuple(power for power in value.unit.dimension if power not in unit.dimension)
    return Scalar(value.node, Unit(tuple(sorted((*unit.dimension, *others)))), value.text)


def _measured(text: str) -> Scalar | None:
    """A value with a unit behind it: the unit starts as early as possible."""
    for start in _unit_starts(text):
        head, tail = text[:start].strip(), text[start:]
        if not head or (node := node_of(head)) is None:
            continue
        if tail.startswith("^") and _OPEN_FUNCTION.search(head):  # the degrees of an angle
            continue
        in_text = r"\text{" in tail
        if node.symbols() and not (in_text and len(re.sub(r"[^A-Za-z]", "", tail)) > 5):  # 4 of them are "text"
            continue
        whole = node.number.numerator if node.op == "number" and node.number.denominator == 1 else None
        if _gloss(tail, whole):
            return Scalar(node, text=head)
        unit = read_unit(tail, plain=not in_text, value=whole)
        if unit is not None and not (node.symbols() and not unit.dimension):
            factor = unit.factor
            return Scalar(node if factor == 1 else Node("multiply", args=(node, number(factor))), unit, head)
    return None


def is_constant(text: str) -> bool:
    node = node_of(text)
    return node is not None and not node.symbols()


def is_scalar(text: str) -> bool:
    return node_of(text) is not None


def equation_of(operator: str, lhs: str, rhs: str) -> Equation | None:
    left, right = node_of(lhs), node_of(rhs)
    return None if left is None or right is None else Equation(operator, left, right)


def node_of(text: str) -> Node | None:
    """The tree of a scalar expression; None if it is none."""
    text = _SINGLE_LETTER.sub(r"\1", text)
    text = _REPEATING.sub(_repeating, _periodic(_CURRENCY.sub("", text)))
    if len(text) > MAX_LENGTH or not text or r"\text" in text:
        return None
    if _SPACED_GROUPS.fullmatch(text) or GROUPED.fullmatch(text):
        text = re.sub(r"[ ,]", "", text)
    try:
        return read_expression(text)
    except Unreadable:
        return None


def _periodic(text: str) -> str:
    r"""`0.\dot{1}2\dot{3}` and `0.(3)` with an overline over the digits that repeat."""
    text = _DOTTED.sub(lambda m: rf"{m[1]}\overline{{{m[2]}{m[3]}{m[4]}}}", text)
    return _PARENTHESISED.sub(r"\1.\\overline{\2}", text)


def _repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction that it is."""
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    shift = 10 ** len(fixed)
    nines = 10 ** len(period) - 1
    above = int(whole + fixed) * nines + int(period)
    return rf"(\frac{{{above}}}{{{shift * nines}}})"


def _unit_starts(text: str) -> list[int]:
    return [match.start() for match in _UNIT_START.finditer(text)][:12]


def _gloss(tail: str, value: int | None) -> bool:
    """`(five)` behind 5."""
    match = _GLOSS.fullmatch(tail)
    return match is not None and value is not None and NUMBER_WORDS.get(match[1]) == value
