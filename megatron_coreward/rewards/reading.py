r"""What kind of thing an answer is: a number, a ratio, a time, a tuple, an equation, words, and so on.

The kinds are told apart before anything is compared, and `sameness.py` compares different kinds by explicit rules only.
A text with more than one meaning (`100,200`) is read as `Alternatives`. What is no kind of mathematics is a `Phrase`.

Invariants: every text has a reading; a reading keeps all that the text says (what it drops is in `units.py`); nesting
deeper than `MAX_DEPTH` is not looked into.
"""

import re
from functools import lru_cache

from megatron_coreward.rewards.brackets import MAX_DEPTH, depth_of, encloses, outer, top_level
from megatron_coreward.rewards.expression import number
from megatron_coreward.rewards.kinds import (
    REALS,
    Alternatives,
    Choice,
    Clock,
    Foreign,
    Items,
    Labelled,
    Matrix,
    Named,
    Numeral,
    Phrase,
    Ratio,
    Reading,
    Region,
    assignments_of,
    region_of,
)
from megatron_coreward.rewards.latex import MAX_LENGTH, clean
from megatron_coreward.rewards.listing import groupings, split_words
from megatron_coreward.rewards.relations import FOREIGN, RELATION, assignment_of, name_of, relation_of
from megatron_coreward.rewards.scalars import is_scalar, node_of, scalar_of
from megatron_coreward.rewards.wordings import NUMBER_WORDS, TEXT, phrase_of, plain_words

MAX_ITEMS = 200  # of a list


@lru_cache(maxsize=8192)
def read(answer: str) -> Reading:
    """The reading of an extracted answer."""
    if len(answer) > MAX_LENGTH:
        return Phrase(answer.strip())
    text = clean(answer)
    if len(text) > 2 * MAX_LENGTH or depth_of(text) > MAX_DEPTH:
        return Phrase(text)
    try:
        return _read(text)
    except RecursionError:
        return Phrase(text)


@lru_cache(maxsize=16384)
def _read(text: str) -> Reading:
    text = outer(text)
    for reader in _READERS:
        if (reading := reader(text)) is not None:
            return reading
    return Phrase(plain_words(text))


def _choice(text: str) -> Reading | None:
    match = _CHOICE.fullmatch(TEXT.sub(r"\1", text).replace(" ", "")) if len(text) < 40 else None
    return Choice(match[1] or match[2]) if match else None


def _labelled(text: str) -> Reading | None:
    match = _LABEL.match(text)
    return Labelled(match[1] or match[2] or match[3], _read(text[match.end() :].strip())) if match else None


def _prefixed(text: str) -> Reading | None:
    r"""`\approx 4.12`, `\text{Answer: }5`, `\therefore x = 2`."""
    match = _PREFIX.match(text)
    return _read(text[match.end() :].strip()) if match and match.end() < len(text) else None


def _unwrapped(text: str) -> Reading | None:
    r"""`\text{12 cm}`, `\text{2 and 3}`: text macros around more than words."""
    if match := _TWO_LETTERS.fullmatch(text):
        return _read(match[1])
    unwrapped = _NUMERIC_TEXT.sub(r"\1", text)
    unwrapped = _TEXT_CONJUNCTION.sub(r" \1 ", unwrapped)
    return _read(" ".join(unwrapped.split())) if unwrapped != text else None


def _environment(text: str) -> Reading | None:
    match = _ENVIRONMENT.fullmatch(text)
    if match is None:
        return None
    body = match[3].strip()
    if match[1] in ("cases", "aligned", "align*", "gathered") or text.startswith(r"\{"):
        lines = [line.strip(" ,;") for line in top_level(body, r"\\")]
        branches = [_branch(line) for line in lines if line]
        if branches and all(branches):
            return _items("", [branch for branch in branches if branch])
        return _collected([line.replace("&", " ") for line in lines if line])
    rows = [row.strip() for row in top_level(body, r"\\")]
    rows = [row for row in rows if row and row != r"\hline"]
    cells = tuple(tuple(_read(cell.strip()) for cell in top_level(row, "&")) for row in rows)
    bars = match[1][0] in "vV" or text[0] == "|" or text.startswith(r"\|")
    return Matrix(cells, bars) if cells else None


def _branch(line: str) -> Reading | None:
    r"""`x^2 & \text{if } x > 0`, a value with its condition; None for an equation that is cut for its alignment."""
    cells = [cell.strip(" ,") for cell in top_level(line, "&")]
    if len(cells) != 2 or not all(cells) or RELATION.match(cells[1]) or RELATION.search(cells[0]):
        return None
    return Items("()", (_read(cells[0]), _read(_IF.sub("", cells[1]).strip())))


def _conjunction(text: str) -> Reading | None:
    r"""`2 and 3`, `x<-1 or x>4`, `(1,2); (3,4)`, `1, 2, and 3`."""
    parts = split_words(text)
    if len(parts) == 1:
        return None
    if len(parts) > MAX_ITEMS:
        return Phrase(text)
    readings = [_read(part[1]) for part in parts]
    regions = [reading for reading in readings if isinstance(reading, Region)]
    names = {region.name for region in regions}
    if len(regions) == len(readings) and len(names) == 1 and "" not in names:
        words = {word for word, _ in parts[1:]}
        if words in ({"or"}, {"and"}):
            return Region("union" if words == {"or"} else "intersection", tuple(regions), names.pop())
    return _collected([part for _, part in parts])


def _list(text: str) -> Reading | None:
    """A list without brackets; digits in groups of three may be one number or several."""
    parts = [part.strip() for part in top_level(text, ",")]
    if len(parts) == 1 or len(parts) > MAX_ITEMS:
        return None if len(parts) == 1 else Phrase(text)
    if not all(parts):
        return Phrase(plain_words(text))
    meanings = groupings(text)
    readings = tuple(_collected(list(parts)) if len(parts) > 1 else _read(parts[0]) for parts in meanings)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _collected(parts: list[str]) -> Reading:
    """A list of parts: values, values of one name (`x=1, 2`), or values of several names."""
    first = assignment_of(parts[0])
    if first is not None and not any(RELATION.search(part) for part in parts[1:]):
        return Named(first[0], _items("", [_read(first[1]), *(_read(part) for part in parts[1:])]))
    assigned = [assignment_of(part) for part in parts]
    known = [item for item in assigned if item is not None]
    if len(known) == len(parts):
        names = [name for name, _ in known]
        values = [_read(value) for _, value in known]
        if len(set(names)) == 1:
            return Named(names[0], _items("", values))
        if len(set(names)) == len(names):
            return assignments_of(names, values)
    return _items("", [_read(part) for part in parts])


def _items(brackets: str, readings: list[Reading]) -> Reading:
    """With the lists inside a list without brackets (from a plus-or-minus sign) as items of it."""
    flat: list[Reading] = []
    for reading in readings:
        if isinstance(reading, Items) and not reading.brackets and brackets in ("", "{}"):
            flat += reading.items
        else:
            flat.append(reading)
    return Items(brackets, tuple(flat))


def _clock(text: str) -> Reading | None:
    plain = " ".join(TEXT.sub(r" \1 ", text).split())
    match = _CLOCK.fullmatch(plain)
    if match is None:
        return None
    hours, minutes, seconds = (int(part) if part else 0 for part in match.group(1, 2, 3))
    half = re.sub(r"[^apm]", "", (match[4] or "").lower())
    if match[2] is None and not half:
        return None
    clock = Clock((hours, minutes, seconds), half)
    if match[3] is None or half or "0" in (match[2][0], match[3][0]):
        return clock
    return Alternatives((clock, Ratio(tuple(number(part) for part in clock.parts))))  # 5:12:13 may be either


def _ratio(text: str) -> Reading | None:
    parts = [part.strip() for part in top_level(text, ":")]
    if len(parts) == 1 and len(parts := [part.strip() for part in _TO.split(text)]) < 2:
        return None
    nodes = [node_of(part) for part in parts]
    known = tuple(node for node in nodes if node is not None)
    return Ratio(known) if len(known) == len(parts) else None


def _numeral(text: str) -> Reading | None:
    match = _NUMERAL.fullmatch(TEXT.sub(r"\1", text).replace(" ", ""))
    if match is None:
        return None
    digits, base = match[1] or match[4], match[2] or match[3] or match[5]
    return Numeral(digits.lstrip("0") or "0", str(NUMBER_WORDS.get(base.lower(), base)))


def _set(text: str) -> Reading | None:
    if text == r"\emptyset":
        return Items("{}", ())
    if not (text.startswith(r"\{") and text.endswith(r"\}") and encloses(text, 1)):
        return None
    inside = text[2:-2].strip()
    for bar in (r"\mid", "|", ":"):
        parts = top_level(inside, bar)
        if len(parts) == 2 and name_of(parts[0].split(r"\in")[0].strip()):
            condition = _read(parts[1].strip())
            return Region(condition.operation, condition.pieces) if isinstance(condition, Region) else None
    if not inside:
        return Items("{}", ())
    meanings = groupings(inside)
    readings = tuple(_items("{}", [_read(part) for part in parts]) for parts in meanings)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _bracketed(text: str) -> Reading | None:
    if text.startswith(_ANGLES[0]) and text.endswith(_ANGLES[1]) and encloses(text, len(_ANGLES[1]) - 1):
        text = f"({text.removeprefix(_ANGLES[0]).removesuffix(_ANGLES[1])})"  # a vector
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]" or not encloses(text, 0):
        return None
    meanings = groupings(text[1:-1])
    if not all(all(parts) for parts in meanings):
        return None
    brackets = text[0] + text[-1]
    several = [parts for parts in meanings if len(parts) > 1]  # in brackets, "(100,200)" is no number
    if not several:
        return _read(meanings[0][0]) if brackets == "()" and not is_scalar(text) else None
    readings = tuple(Items(brackets, tuple(_read(part) for part in parts)) for parts in several)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _combined(text: str) -> Reading | None:
    r"""Unions and differences of sets of numbers."""
    if text in _ALL_REALS:
        return Region("union", (REALS,))
    for operator, operation in ((r"\cup", "union"), (r"\setminus", "without"), (r"\cap", "intersection")):
        parts = [part.strip() for part in top_level(text, operator)]
        if len(parts) > 1 and all(parts):
            pieces = [region_of(_read(part)) for part in parts]
            known = tuple(piece for piece in pieces if piece is not None)
            return Region(operation, known) if len(known) == len(parts) else None
    if (match := re.fullmatch(r"\\mathbb\{R\} ?- ?(\\\{.*\\\})", text)) and (points := region_of(_read(match[1]))):
        return Region("without", (REALS, points))
    return None


def _plus_or_minus(text: str) -> Reading | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    plus = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    minus = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return _items("", [_read(plus), _read(minus)]) if plus != text else None


def _foreign(text: str) -> Reading | None:
    return Foreign(text) if FOREIGN.search(text) and r"\text" not in text else None


def _phrase(text: str) -> Reading | None:
    return phrase_of(text, read=_read)


def _related(text: str) -> Reading | None:
    return relation_of(text, read=_read)


_READERS = (
    _choice, _labelled, _prefixed, _phrase, _unwrapped, _environment, _set, _conjunction, _list, _combined, _bracketed,
    _related, _clock, _numeral, _ratio, _plus_or_minus, scalar_of, _foreign,
)  # fmt: skip
_ALL_REALS = frozenset({r"\mathbb{R}", r"\mathbf{R}", r"\mathcal{R}", r"\Bbb{R}", r"\R", r"\text{R}"})
_ANGLES = (r"\langle", r"\rangle")
_NUMERIC_TEXT = re.compile(r"\\text\{([^{}]*(?<!\^)(?<!\^-)\d[^{}]*)\}")
_TWO_LETTERS = re.compile(r"\\text\{\s*([A-Za-z]{1,2})\s*\}")
_TEXT_CONJUNCTION = re.compile(r"\\text\{\s*(and|or)\s*\}|(?<![A-Za-z\\])(?:\\lor|\\vee)(?=\s+[a-z] ?[<>=\\])")
_CHOICE = re.compile(r"(?:(?:[Aa]nswer)?(?:[Oo]ption|[Cc]hoice):?)?(?:\(([A-Z])\)|([A-Z]))")
_LABEL = re.compile(
    r"\s*(?:\\text\{\s*\(?([A-E])\s*[).]\s*\}|\(\s*(?:\\text\{\s*)?([A-E])\s*\}?\s*\)(?=\s)|([A-E])\)(?=\s))\s*"
    r"(?=[-+\d.$]|\\(?:frac|sqrt|text|pi))"
)
_IF = re.compile(r"^\\text\{\s*,?\s*(?:if|for|when)\s*\}|^(?:if|for|when)\b")
_TO = re.compile(r"(?<=[\d}])\s+(?:to|\\text\{\s*to\s*\})\s+|(?<=[\d}])\s*\\text\{\s*to\s*\}\s*")
_PREFIX = re.compile(
    r"(?:\\approx|\\therefore|\\implies|\\Rightarrow|\\sim(?= ?\d)|"
    r"\\text\{\s*(?:the )?(?:final )?answers?(?: is)?\s*:?\s*\}\s*:?|(?:the )?(?:final )?answer(?: is)?\s*:|"
    r"\\text\{\s*\})\s*",
    re.IGNORECASE,
)
_ENVIRONMENT = re.compile(
    r"(?:[(\[|]|\\\{)?\s*\\begin\{([a-zA-Z]+\*?)\}(\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]|]?", re.DOTALL
)
_CLOCK = re.compile(r"(\d{1,2})(?: ?: ?(\d{2}))?(?: ?: ?(\d{2}))? ?(a\.? ?m\.?|p\.? ?m\.?)?", re.IGNORECASE | re.ASCII)
_NUMERAL = re.compile(
    r"(?:\(|\\overline\{)?(\d[0-9A-F]*(?:\.[0-9A-F]+)?)[)}]?_(?:\{?(\d{1,2})\}?|\{?\(?([a-z]{3,11}|\d{1,2})\)?\}?)"
    r"|(\d[0-9A-F]*)\(?(?:in)?base(\d{1,2}|[a-z]{3,11})\)?",
    re.ASCII,
)
