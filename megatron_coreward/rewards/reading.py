r"""What kind of thing an answer is: a number, a ratio, a time, a tuple, an equation, words, and so on.

The kinds are told apart before anything is compared, and `sameness.py` compares different kinds by explicit rules only.
A text with more than one meaning (`100,200`) is read as `Alternatives`. What is no kind of mathematics is a `Phrase`.

Invariants: every text has a reading; a reading keeps all that the text says (what it drops is in `units.py`); nesting
deeper than `MAX_DEPTH` is not looked into.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_coreward.rewards.expression import Node, Unreadable, difference, number, read_expression
from megatron_coreward.rewards.latex import MAX_LENGTH, clean, closing_brace
from megatron_coreward.rewards.units import NO_UNIT, Unit, read_unit

MAX_DEPTH = 30  # brackets open at once; what is nested deeper is no answer
MAX_ITEMS = 200  # of a list


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or expression, with the unit that stands behind it; text: its LaTeX, without the unit."""

    node: Node
    unit: Unit = NO_UNIT
    text: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Numeral:
    """Digits in a base: `101_2`."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Ratio:
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day or a duration: hours, minutes and seconds as written; half: `am`, `pm` or nothing."""

    parts: tuple[int, ...]
    half: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Several values. brackets: `()`, `[]`, `[)`, `(]`, `{}` for a set and nothing for a list without brackets."""

    brackets: str
    items: tuple["Reading", ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """An interval of real numbers; of a single point, both ends are the same and closed."""

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A set of real numbers as a union of intervals, or without `complement` of them; name: the variable, if named.

    operation: how the pieces combine: `union`, `intersection`, or `without` (the first piece without the others).
    """

    operation: str
    pieces: tuple["Piece | Region", ...]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """determinant: it stands between bars."""

    rows: tuple[tuple["Reading", ...], ...]
    determinant: bool = False


@dataclass(frozen=True, slots=True)
class Equation:
    """`lhs = rhs`, or another relation (`operator`)."""

    operator: str
    lhs: Node
    rhs: Node


@dataclass(frozen=True, slots=True)
class Named:
    r"""A value with the name that it was given, `x = 4` or `\text{Area} = 12`; as an equation too if it is one."""

    name: str
    value: "Reading"
    equation: Equation | None = None


@dataclass(frozen=True, slots=True)
class Assignments:
    """Values of several names, in alphabetical order: `x = 1, y = 2`, `(x, y) = (1, 2)`."""

    names: tuple[str, ...]
    values: tuple["Reading", ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple-choice question."""

    letter: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A letter of a multiple-choice question with the value behind it: `(D) 12`."""

    letter: str
    value: "Reading"


@dataclass(frozen=True, slots=True)
class Congruence:
    r"""`x \equiv 3 \pmod 7`: the remainder, from 0 on; name: what has it, if named."""

    remainder: int
    modulus: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words, and everything that is none of the other kinds: the same as nothing but the same text."""

    text: str


@dataclass(frozen=True, slots=True)
class Foreign:
    r"""LaTeX that only the computer algebra system reads: sums, integrals, limits."""

    text: str


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One text, several meanings: the same as what any of them is the same as."""

    readings: tuple["Reading", ...]


Reading = (
    Scalar | Numeral | Ratio | Clock | Items | Region | Matrix | Equation | Named | Assignments | Choice | Labelled
    | Congruence | Phrase | Foreign | Alternatives
)  # fmt: skip


@lru_cache(maxsize=8192)
def read(answer: str) -> Reading:
    """The reading of an extracted answer."""
    if len(answer) > MAX_LENGTH:
        return Phrase(answer.strip())
    text = clean(answer)
    if len(text) > 2 * MAX_LENGTH or _depth(text) > MAX_DEPTH:
        return Phrase(text)
    try:
        return _read(text)
    except RecursionError:
        return Phrase(text)


# --- kinds, in the order in which they are tried ---------------------------------------------------------------------


@lru_cache(maxsize=16384)
def _read(text: str) -> Reading:
    text = _outer(text)
    for reader in _READERS:
        if (reading := reader(text)) is not None:
            return reading
    return Phrase(_words(text))


def _choice(text: str) -> Reading | None:
    match = _CHOICE.fullmatch(_TEXT.sub(r"\1", text).replace(" ", "")) if len(text) < 40 else None
    return Choice(match[1] or match[2]) if match else None


def _labelled(text: str) -> Reading | None:
    match = _LABEL.match(text)
    return Labelled(match[1] or match[2] or match[3], _read(text[match.end() :].strip())) if match else None


def _prefixed(text: str) -> Reading | None:
    r"""`\approx 4.12`, `\text{Answer: }5`, `\therefore x = 2`, `USD 12`."""
    match = _PREFIX.match(text)
    return _read(text[match.end() :].strip()) if match and match.end() < len(text) else None


def _phrase(text: str) -> Reading | None:
    """Words without mathematics."""
    words = _TEXT.sub(r" \1 ", text)
    bare = " ".join(words.split()).strip(" .,;:!?'\"")
    if _WORD.fullmatch(bare) and bare.lower() not in _MATHEMATICAL_WORDS:
        return _spoken(bare)
    if bare.lower() in ("infinity", "inf"):
        return Scalar(Node("constant", "infinity"))
    if any(ord(char) > 0x2E7F for char in bare) and not any(char.isdigit() for char in bare):  # CJK
        return Phrase(_words(text))
    if _SEVERAL_WORDS.fullmatch(bare):
        if _CONJUNCTION.search(bare) is None:
            return _spoken(bare)
        return _read(bare) if bare != text else None
    return None


def _spoken(words: str) -> Reading:
    """Without the article in front, and in one of several customary wordings."""
    words = _ARTICLE.sub("", words.lower())
    words = _WORDINGS.get(words, words)
    if words.replace("-", " ") in _NUMBER_WORDS:
        return Scalar(number(_NUMBER_WORDS[words.replace("-", " ")]))
    return Region("union", (_REALS,)) if words == "real" else Phrase(_words(words))


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
        lines = [line.strip(" ,;") for line in _top_level(body, r"\\")]
        branches = [_branch(line) for line in lines if line]
        if branches and all(branches):
            return _items("", [branch for branch in branches if branch])
        return _collected([line.replace("&", " ") for line in lines if line])
    rows = [row.strip() for row in _top_level(body, r"\\")]
    rows = [row for row in rows if row and row != r"\hline"]
    cells = tuple(tuple(_read(cell.strip()) for cell in _top_level(row, "&")) for row in rows)
    bars = match[1][0] in "vV" or text[0] == "|" or text.startswith(r"\|")
    return Matrix(cells, bars) if cells else None


def _branch(line: str) -> Reading | None:
    r"""`x^2 & \text{if } x > 0`, a value with its condition; None for an equation that is cut for its alignment."""
    cells = [cell.strip(" ,") for cell in _top_level(line, "&")]
    if len(cells) != 2 or not all(cells) or _RELATION.match(cells[1]) or _RELATION.search(cells[0]):
        return None
    return Items("()", (_read(cells[0]), _read(_IF.sub("", cells[1]).strip())))


def _conjunction(text: str) -> Reading | None:
    r"""`2 and 3`, `x<-1 or x>4`, `(1,2); (3,4)`, `1, 2, and 3`."""
    parts = _split_words(text)
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
    parts = [part.strip() for part in _top_level(text, ",")]
    if len(parts) == 1 or len(parts) > MAX_ITEMS:
        return None if len(parts) == 1 else Phrase(text)
    if not all(parts):
        return Phrase(_words(text))
    meanings = _groupings(text)
    readings = tuple(_collected(list(parts)) if len(parts) > 1 else _read(parts[0]) for parts in meanings)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _groupings(text: str) -> list[tuple[str, ...]]:
    """The ways to read the commas of a list: with thousands separators joined, and with every comma parting."""
    joined = tuple(part.strip().replace(",", "") if _GROUPED.fullmatch(part.strip()) else part.strip()
                   for part in _top_level(_GROUP_COMMA.sub("\0", text).replace("\0", "\\grouped"), ","))  # fmt: skip
    joined = tuple(part.replace("\\grouped", "") for part in joined)
    split = tuple(part.strip() for part in _top_level(text, ","))
    if joined == split:
        return [split]
    if any(re.match(r"0\d", part) for part in split):  # "1,000" is no list
        return [joined]
    return [joined, split]


def _collected(parts: list[str]) -> Reading:
    """A list of parts: values, values of one name (`x=1, 2`), or values of several names."""
    first = _assignment(parts[0])
    if first is not None and not any(_RELATION.search(part) for part in parts[1:]):
        return Named(first[0], _items("", [_read(first[1]), *(_read(part) for part in parts[1:])]))
    assigned = [_assignment(part) for part in parts]
    known = [item for item in assigned if item is not None]
    if len(known) == len(parts):
        names = [name for name, _ in known]
        values = [_read(value) for _, value in known]
        if len(set(names)) == 1:
            return Named(names[0], _items("", values))
        if len(set(names)) == len(names):
            return _assignments(names, values)
    return _items("", [_read(part) for part in parts])


def _assignments(names: list[str], values: list[Reading]) -> Assignments:
    pairs = sorted(zip(names, values, strict=True), key=lambda pair: pair[0])
    return Assignments(tuple(name for name, _ in pairs), tuple(value for _, value in pairs))


def _items(brackets: str, readings: list[Reading]) -> Reading:
    """With the lists inside a list without brackets (from a plus-or-minus sign) as items of it."""
    flat: list[Reading] = []
    for reading in readings:
        if isinstance(reading, Items) and not reading.brackets and brackets in ("", "{}"):
            flat += reading.items
        else:
            flat.append(reading)
    return Items(brackets, tuple(flat))


def _relation(text: str) -> Reading | None:
    operators, sides = _split_relation(text)
    if not operators:
        return None
    if not all(sides):
        return _congruence(text) or Phrase(_words(text))
    if set(operators) <= {"=", r"\approx"}:
        return _equality(sides, operators) or Phrase(_words(text))
    if operators == [r"\in"]:
        name = _name(sides[0])
        return Named(name, _read(sides[1])) if name else Phrase(_words(text))
    return _inequality(operators, sides) or Phrase(_words(text))


def _equality(sides: list[str], operators: list[str]) -> Reading | None:
    names = [_name(side) for side in sides]
    if len(sides) > 2:
        return _chain(sides, names)
    (lhs, rhs), (left, right) = sides, names
    tuple_names, values = _tuple_of_names(lhs), _bracketed(rhs)
    if tuple_names and isinstance(values, Items) and len(values.items) == len(tuple_names):
        return _assignments(tuple_names, list(values.items))
    equation = _equation("=", lhs, rhs)
    if _FOREIGN.search(lhs) and _is_constant(rhs):  # a sum and what it is
        return Named(_words(lhs), _read(rhs))
    if left and (right is None or not _is_constant(lhs)):
        return _named(left, lhs, rhs)
    if right:
        return _named(right, rhs, lhs)
    if equation is None or (_is_constant(lhs) and _is_constant(rhs)):
        values_ = _read(lhs), _read(rhs)
        if all(isinstance(value, Scalar) for value in values_):
            # "2^{10} = 1024" ends in its value; "5 km = 5000 m" says one thing in two units
            units = [value.unit.dimension for value in values_ if isinstance(value, Scalar)]
            exact = r"\approx" not in operators
            return Alternatives(values_) if all(units) else Named("", values_[1], equation if exact else None)
    return equation


def _named(name: str, side: str, other: str) -> Named:
    r"""The value without its unit is a side of the equation, too: `\\angle A = 90^\\circ` is `\\angle A = 90`."""
    value, node = _read(other), _node(side)
    if isinstance(value, Scalar) and node is not None:
        return Named(name, value, Equation("=", node, value.node))
    return Named(name, value, _equation("=", side, other))


def _congruence(text: str) -> Congruence | None:
    match = _CONGRUENCE.fullmatch(text)
    if match is None or not int(match[3]):
        return None
    name = _name(match[1].strip()) if match[1] else ""
    modulus = int(match[3])
    return None if name is None else Congruence(int(match[2].replace(" ", "")) % modulus, modulus, name)


def _chain(sides: list[str], names: list[str | None]) -> Reading | None:
    """`x = 3 \\cdot 4 = 12` is 12; `x = y = 0` are two values."""
    *firsts, last = names
    known = [name for name in firsts if name]
    if known and last is None:
        if len(known) == len(firsts) and len(set(known)) == len(known):
            return _assignments(known, [_read(sides[-1])] * len(known))
        if names[0]:
            return Named(names[0], _read(sides[-1]))
    if all(_is_constant(side) for side in sides):
        return Named("", _read(sides[-1]))
    return None


def _inequality(operators: list[str], sides: list[str]) -> Reading | None:
    """Bounds of one variable are a region; other inequalities are compared as relations."""
    bounds = _bounds(operators, sides)
    if bounds is not None:
        return bounds
    if len(operators) == 1 and operators[0] in _MIRRORED:
        operator, lhs, rhs = operators[0], sides[0], sides[1]
        if operator in ("<", r"\le"):
            operator, lhs, rhs = _MIRRORED[operator], rhs, lhs
        return _equation(operator, lhs, rhs)
    return None


def _bounds(operators: list[str], sides: list[str]) -> Region | None:
    if not set(operators) <= set(_MIRRORED) or len(sides) > 3:
        return None
    nodes = [_node(side) for side in sides]
    if len(sides) == 2:
        if _is_variable(nodes[1]) and not _is_variable(nodes[0]):
            nodes, operators = nodes[::-1], [_MIRRORED[operators[0]]]
        variable, bound = nodes
        if variable is None or bound is None or not _is_variable(variable) or bound.symbols():
            return None
        return Region("union", (half_line(operators[0], bound),), variable.name)
    low, variable, high = nodes
    if low is None or variable is None or high is None or not _is_variable(variable) or r"\ne" in operators:
        return None
    if low.symbols() or high.symbols() or (operators[0] in "<\\le") != (operators[1] in "<\\le"):
        return None
    first = half_line(_MIRRORED[operators[0]], low)
    return Region("intersection", (first, half_line(operators[1], high)), variable.name)


def half_line(operator: str, bound: Node) -> "Piece | Region":
    """What a bound leaves of the real line."""
    if operator == r"\ne":
        return Region("without", (_REALS, Piece(bound, True, bound, True)))
    if operator in (">", r"\ge"):
        return Piece(bound, operator == r"\ge", _INFINITY, False)
    return Piece(_MINUS_INFINITY, False, bound, operator == r"\le")


def _clock(text: str) -> Reading | None:
    plain = " ".join(_TEXT.sub(r" \1 ", text).split())
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
    parts = [part.strip() for part in _top_level(text, ":")]
    if len(parts) == 1 and len(parts := [part.strip() for part in _TO.split(text)]) < 2:
        return None
    nodes = [_node(part) for part in parts]
    known = tuple(node for node in nodes if node is not None)
    return Ratio(known) if len(known) == len(parts) else None


def _numeral(text: str) -> Reading | None:
    match = _NUMERAL.fullmatch(_TEXT.sub(r"\1", text).replace(" ", ""))
    if match is None:
        return None
    digits, base = match[1] or match[4], match[2] or match[3] or match[5]
    return Numeral(digits.lstrip("0") or "0", str(_NUMBER_WORDS.get(base.lower(), base)))


def _set(text: str) -> Reading | None:
    if text == r"\emptyset":
        return Items("{}", ())
    if not (text.startswith(r"\{") and text.endswith(r"\}") and _encloses(text, 1)):
        return None
    inside = text[2:-2].strip()
    for bar in (r"\mid", "|", ":"):
        parts = _top_level(inside, bar)
        if len(parts) == 2 and _name(parts[0].split(r"\in")[0].strip()):
            condition = _read(parts[1].strip())
            return Region(condition.operation, condition.pieces) if isinstance(condition, Region) else None
    if not inside:
        return Items("{}", ())
    meanings = _groupings(inside)
    readings = tuple(_items("{}", [_read(part) for part in parts]) for parts in meanings)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _bracketed(text: str) -> Reading | None:
    if text.startswith(_ANGLES[0]) and text.endswith(_ANGLES[1]) and _encloses(text, len(_ANGLES[1]) - 1):
        text = f"({text.removeprefix(_ANGLES[0]).removesuffix(_ANGLES[1])})"  # a vector
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]" or not _encloses(text, 0):
        return None
    meanings = _groupings(text[1:-1])
    if not all(all(parts) for parts in meanings):
        return None
    brackets = text[0] + text[-1]
    several = [parts for parts in meanings if len(parts) > 1]  # in brackets, "(100,200)" is no number
    if not several:
        return _read(meanings[0][0]) if brackets == "()" and not _is_scalar(text) else None
    readings = tuple(Items(brackets, tuple(_read(part) for part in parts)) for parts in several)
    return readings[0] if len(readings) == 1 else Alternatives(readings)


def _combined(text: str) -> Reading | None:
    r"""Unions and differences of sets of numbers."""
    if text in _ALL_REALS:
        return Region("union", (_REALS,))
    for operator, operation in ((r"\cup", "union"), (r"\setminus", "without"), (r"\cap", "intersection")):
        parts = [part.strip() for part in _top_level(text, operator)]
        if len(parts) > 1 and all(parts):
            pieces = [region_of(_read(part)) for part in parts]
            known = tuple(piece for piece in pieces if piece is not None)
            return Region(operation, known) if len(known) == len(parts) else None
    if (match := re.fullmatch(r"\\mathbb\{R\} ?- ?(\\\{.*\\\})", text)) and (points := region_of(_read(match[1]))):
        return Region("without", (_REALS, points))
    return None


def region_of(reading: Reading) -> Region | None:
    """An interval, a set of numbers or a region as a region; None for everything else."""
    if isinstance(reading, Region):
        return reading
    if not isinstance(reading, Items) or not reading.brackets:
        return None
    nodes = [item.node for item in reading.items if isinstance(item, Scalar) and not item.node.symbols()]
    if len(nodes) != len(reading.items):
        return None
    if reading.brackets == "{}":
        return Region("union", tuple(Piece(node, True, node, True) for node in nodes))
    if len(nodes) != 2:
        return None
    return Region("union", (Piece(nodes[0], reading.brackets[0] == "[", nodes[1], reading.brackets[1] == "]"),))


def _plus_or_minus(text: str) -> Reading | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    plus = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    minus = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    return _items("", [_read(plus), _read(minus)]) if plus != text else None


def _scalar(text: str) -> Reading | None:
    if price := _PRICE.match(text):
        return _priced(price[2], f"{price[1]}{text[price.end() :]}".strip())
    if measured := _measured(text):
        return measured
    node = _node(text)
    return Scalar(node, text=text) if node is not None else None


def _priced(currency: str, text: str) -> Reading | None:
    """`\\text{USD}5 per hour`."""
    value = _scalar(text)
    unit = read_unit(currency, plain=False)
    if not isinstance(value, Scalar) or unit is None:
        return None
    others = tuple(power for power in value.unit.dimension if power not in unit.dimension)
    return Scalar(value.node, Unit(tuple(sorted((*unit.dimension, *others)))), value.text)


def _measured(text: str) -> Scalar | None:
    """A value with a unit behind it: the unit starts as early as possible."""
    for start in _unit_starts(text):
        head, tail = text[:start].strip(), text[start:]
        if not head or (node := _node(head)) is None:
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


def _foreign(text: str) -> Reading | None:
    return Foreign(text) if _FOREIGN.search(text) and r"\text" not in text else None


_READERS = (
    _choice, _labelled, _prefixed, _phrase, _unwrapped, _environment, _set, _conjunction, _list, _combined, _bracketed,
    _relation, _clock, _numeral, _ratio, _plus_or_minus, _scalar, _foreign,
)  # fmt: skip


# --- parts ------------------------------------------------------------------------------------------------------------

_INFINITY = Node("constant", "infinity")
_MINUS_INFINITY = Node("multiply", args=(number(-1), _INFINITY))
_REALS = Piece(_MINUS_INFINITY, False, _INFINITY, False)
_ALL_REALS = frozenset({r"\mathbb{R}", r"\mathbf{R}", r"\mathcal{R}", r"\Bbb{R}", r"\R", r"\text{R}"})
_ANGLES = (r"\langle", r"\rangle")
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}

_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_NUMERIC_TEXT = re.compile(r"\\text\{([^{}]*(?<!\^)(?<!\^-)\d[^{}]*)\}")
_TWO_LETTERS = re.compile(r"\\text\{\s*([A-Za-z]{1,2})\s*\}")
_TEXT_CONJUNCTION = re.compile(r"\\text\{\s*(and|or)\s*\}|(?<![A-Za-z\\])(?:\\lor|\\vee)(?=\s+[a-z] ?[<>=\\])")
_CHOICE = re.compile(r"(?:(?:[Aa]nswer)?(?:[Oo]ption|[Cc]hoice):?)?(?:\(([A-Z])\)|([A-Z]))")
_LABEL = re.compile(
    r"\s*(?:\\text\{\s*\(?([A-E])\s*[).]\s*\}|\(\s*(?:\\text\{\s*)?([A-E])\s*\}?\s*\)(?=\s)|([A-E])\)(?=\s))\s*"
    r"(?=[-+\d.$]|\\(?:frac|sqrt|text|pi))"
)
_ARTICLE = re.compile(r"^(?:the|an?) (?=[a-z]{3})")
_WORDINGS = {  # other words for one thing, without an article
    **dict.fromkeys(
        ("no solutions", "there is no solution", "there are no solutions", "no solution exists"), "no solution"
    ),
    **dict.fromkeys(("no real solutions", "there are no real solutions"), "no real solution"),
    **dict.fromkeys(("dne", "doesn't exist", "limit does not exist"), "does not exist"),
    **dict.fromkeys(("infinitely many solutions", "infinite solutions", "infinite number of solutions"),
                    "infinitely many"),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "set of all real numbers", "any real number"),
                    "real"),
}  # fmt: skip
_IF = re.compile(r"^\\text\{\s*,?\s*(?:if|for|when)\s*\}|^(?:if|for|when)\b")
_TO = re.compile(r"(?<=[\d}])\s+(?:to|\\text\{\s*to\s*\})\s+|(?<=[\d}])\s*\\text\{\s*to\s*\}\s*")
_PRICE = re.compile(r"([+-]?)\s*(?:\\text\{)?\s*(USD|EUR|GBP|JPY|INR|Rs)\.?\s*\}?\s*(?=[-+\d.\\(])")
_CURRENCY = re.compile(r"(?<![A-Za-z\\])(?:USD|EUR|GBP|JPY|INR) ")
_CONGRUENCE = re.compile(
    r"(?:(.{1,30}?)\\equiv)?\s*(- ?\d{1,15}|\d{1,15})\s*\(?\\(?:pmod|bmod)\s*\{?\s*(\d{1,15})\s*\}?\s*\)?"
)
_WORD = re.compile(r"[A-Za-z]{3,}|no", re.IGNORECASE | re.ASCII)
_SEVERAL_WORDS = re.compile(
    r"(?=.*[A-Za-z]{3})(?:[Aa](?= (?!sin|cos|tan|log|sqrt)[a-z]{3})|[A-Za-z][A-Za-z',.-]+)(?: [A-Za-z',.-]+)*"
)
_MATHEMATICAL_WORDS = frozenset({"infinity", "inf", "sin", "cos", "tan", "log"})
_PREFIX = re.compile(
    r"(?:\\approx|\\therefore|\\implies|\\Rightarrow|\\sim(?= ?\d)|"
    r"\\text\{\s*(?:the )?(?:final )?answers?(?: is)?\s*:?\s*\}\s*:?|(?:the )?(?:final )?answer(?: is)?\s*:|"
    r"\\text\{\s*\})\s*",
    re.IGNORECASE,
)
_ENVIRONMENT = re.compile(
    r"(?:[(\[|]|\\\{)?\s*\\begin\{([a-zA-Z]+\*?)\}(\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]|]?", re.DOTALL
)
_RELATION_OPERATORS = r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]"
_OTHER_RELATIONS = (
    r"\\(?:notin|equiv|mid|nmid|subset|subseteq|supset|propto|cong|simeq|perp|parallel|to|pmod)(?![A-Za-z])"
)
_RELATION = re.compile(f"{_RELATION_OPERATORS}|{_OTHER_RELATIONS}")
_CLOCK = re.compile(r"(\d{1,2})(?: ?: ?(\d{2}))?(?: ?: ?(\d{2}))? ?(a\.? ?m\.?|p\.? ?m\.?)?", re.IGNORECASE | re.ASCII)
_NUMERAL = re.compile(
    r"(?:\(|\\overline\{)?(\d[0-9A-F]*(?:\.[0-9A-F]+)?)[)}]?_(?:\{?(\d{1,2})\}?|\{?\(?([a-z]{3,11}|\d{1,2})\)?\}?)"
    r"|(\d[0-9A-F]*)\(?(?:in)?base(\d{1,2}|[a-z]{3,11})\)?",
    re.ASCII,
)
_SMALL_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL_NUMBERS)}
_NUMBER_WORDS |= {ten: 10 * value for value, ten in enumerate(_TENS, 2)}
_NUMBER_WORDS |= {
    f"{ten} {unit}": 10 * value + one
    for value, ten in enumerate(_TENS, 2)
    for one, unit in enumerate(_SMALL_NUMBERS[1:10], 1)
}
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_GROUP_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CONJUNCTION = re.compile(r",?\s+(and|or)\s+|\s*(;)\s*|,\s*(and|or)\s+")
_OPEN_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)(?![A-Za-z])[^()]*$")
_FOREIGN = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|partial|nabla|begin)(?![A-Za-z])")
_UNIT_START = re.compile(
    r"\\text\{|\\frac\{\s*\\text|\\mu|\^\{?\s*\\circ|\^\{?\s*\\text\{|\^\{?(?:th|st|nd|rd)\b|%|\\Omega|¢|\s(?=[A-Za-z°(\\])|"
    r"(?<=\d)(?=(?:th|st|nd|rd)$)"
)
_GLOSS = re.compile(r"\s*(?:\\text\{)?\s*\(\s*(?:\\text\{)?\s*([a-z]+)\s*\}?\s*\)\s*\}?\s*")
_OPEN = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1, r"\{": 1, r"\}": -1, r"\langle": 1, r"\rangle": -1}
_BRACKETS = re.compile(r"\\begin(?![A-Za-z])|\\end(?![A-Za-z])|\\[A-Za-z]+|\\.|[()\[\]{}]|.", re.DOTALL)


def _outer(text: str) -> str:
    """Without the braces around everything and the punctuation behind."""
    text = text.strip()
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text.rstrip(".,;: ") or text


def _depth(text: str) -> int:
    """How many brackets are open at once, at most; those that nothing closes count."""
    depth = deepest = 0
    for token in _BRACKETS.finditer(text):
        depth += _OPEN.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _walk(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, brackets open before it) for each token."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token == r"\end":
            depth -= 1
        step = _OPEN.get(token, 0)
        if step < 0:
            depth += step
        yield match.start(), token, depth
        if step > 0:
            depth += step
        if token == r"\begin":
            depth += 1


def _top_level(text: str, separator: str) -> list[str]:
    """The parts of a text between separators outside every bracket."""
    parts, start = [], 0
    for position, token, depth in _walk(text):
        if token == separator and depth == 0:
            parts.append(text[start:position])
            start = position + len(separator)
    return [*parts, text[start:]]


def _encloses(text: str, opening: int) -> bool:
    """Whether the bracket at the start is closed by the one at the end."""
    return all(depth > 0 or position in (0, len(text) - 1, len(text) - 2) for position, _, depth in _walk(text)
               if 0 < position < len(text) - 1 - opening)  # fmt: skip


def _split_words(text: str) -> list[tuple[str, str]]:
    """(conjunction before, part) of a text with "and", "or" or semicolons outside every bracket."""
    if _CONJUNCTION.search(text) is None:
        return [("", text)]
    outside = {position for position, _, depth in _walk(text) if depth == 0}
    parts, start, word = [], 0, ""
    for match in _CONJUNCTION.finditer(text):
        if match.start() in outside:
            parts.append((word, text[start : match.start()].strip()))
            start, word = match.end(), match[1] or match[2] or match[3]
    parts.append((word, text[start:].strip()))
    if len(parts) == 1 or not all(part for _, part in parts):
        return [("", text)]
    last = parts.pop()
    listed = [(word, piece.strip()) for word, part in parts for piece in _listed(part)]
    return [*listed, last]


def _listed(part: str) -> list[str]:
    """The commas of a list before its "and"."""
    (*_, parts) = _groupings(part)[:1]
    return [piece for piece in parts if piece]


def _split_relation(text: str) -> tuple[list[str], list[str]]:
    """The relations outside every bracket and the texts between them."""
    operators, sides, start = [], [], 0
    for position, token, depth in _walk(text):
        if depth == 0 and _RELATION.fullmatch(token):
            if re.fullmatch(_OTHER_RELATIONS, token):
                return [token], ["", ""]
            operators.append(token)
            sides.append(text[start:position].strip())
            start = position + len(token)
    return operators, [*sides, text[start:].strip()]


def _assignment(text: str) -> tuple[str, str] | None:
    """(name, value) of `x = 4`; None for everything else."""
    operators, sides = _split_relation(text)
    if operators != ["="] or not all(sides):
        return None
    if name := _name(sides[0]):
        return name, sides[1]
    return (name, sides[0]) if (name := _name(sides[1])) else None


def _tuple_of_names(text: str) -> list[str] | None:
    if not (text.startswith("(") and text.endswith(")")):
        return None
    names = [_name(part.strip()) for part in _top_level(text[1:-1], ",")]
    known = [name for name in names if name]
    return known if len(known) == len(names) > 1 and len(set(known)) == len(known) else None


def _name(text: str) -> str | None:
    r"""The name that an equation gives its other side, without spaces; None if the text is no name.

    Names are words, symbols, applications (`f(x)`, `P(A)`), lengths (`|AB|`), and sums and products of symbols.
    """
    if len(text) > 60:
        return None
    words = " ".join(_TEXT.sub(r" \1 ", text).split())
    if _NAME_WORDS.fullmatch(words) and (r"\text" in text or len(words) > 3):
        return words.lower()
    node = _node(text)
    if node is None or not node.symbols() or _has_number(node) or _is_plain_power(node):
        return None
    return text.replace(" ", "").replace("{", "").replace("}", "")


_NAME_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+){0,5}")


def _has_number(node: Node) -> bool:
    """Whether a number is a term or factor: `2x`, `x - 3`."""
    if node.op == "number":
        return node.number != -1
    if node.op in ("add", "multiply"):
        return any(_has_number(arg) for arg in node.args)
    return node.op == "power" and _has_number(node.args[0])


def _is_plain_power(node: Node) -> bool:
    """`x^2`, `|x|`: of one variable, whose value the equation leaves open."""
    plain = node.op == "power" or (node.op == "call" and node.name in ("abs", "factorial", "root"))
    return plain and node.args[0].op == "symbol" and not re.search(r"[fgh]", node.args[0].name)


def _is_variable(node: Node | None) -> bool:
    return node is not None and node.op == "symbol"


def _is_constant(text: str) -> bool:
    node = _node(text)
    return node is not None and not node.symbols()


def _is_scalar(text: str) -> bool:
    return _node(text) is not None


def _equation(operator: str, lhs: str, rhs: str) -> Equation | None:
    left, right = _node(lhs), _node(rhs)
    return None if left is None or right is None else Equation(operator, left, right)


def zero_form(equation: Equation) -> Node:
    """`lhs - rhs`."""
    return difference(equation.lhs, equation.rhs)


def _node(text: str) -> Node | None:
    """The tree of a scalar expression; None if it is none."""
    text = _SINGLE_LETTER.sub(r"\1", text)
    text = _REPEATING.sub(_repeating, _periodic(_CURRENCY.sub("", text)))
    if len(text) > MAX_LENGTH or not text or r"\text" in text:
        return None
    if _SPACED_GROUPS.fullmatch(text) or _GROUPED.fullmatch(text):
        text = re.sub(r"[ ,]", "", text)
    try:
        return read_expression(text)
    except Unreadable:
        return None


_SINGLE_LETTER = re.compile(r"\\text\{\s*([A-Za-z])\s*\}")
_SPACED_GROUPS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII)


def _periodic(text: str) -> str:
    r"""`0.\dot{1}2\dot{3}` and `0.(3)` with an overline over the digits that repeat."""
    text = _DOTTED.sub(lambda m: rf"{m[1]}\overline{{{m[2]}{m[3]}{m[4]}}}", text)
    return _PARENTHESISED.sub(r"\1.\\overline{\2}", text)


_DOTTED = re.compile(r"(\d*\.\d*)\\dot\s*\{?\s*(\d)\s*\}?\s*(\d*)\s*\\dot\s*\{?\s*(\d)\s*\}?", re.ASCII)
_PARENTHESISED = re.compile(r"(\d+)\.\((\d+)\)", re.ASCII)


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
    return match is not None and value is not None and _NUMBER_WORDS.get(match[1]) == value


def _words(text: str) -> str:
    """A text by which phrases are compared: without macros, case and spaces."""
    return re.sub(r"[\s{}]+", "", _TEXT.sub(r" \1 ", text)).casefold()
