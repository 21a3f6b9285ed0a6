"""The kinds of things that an answer may be: a number, a ratio, a time, a tuple, an equation, words, and so on."""

from dataclasses import dataclass, field

from megatron_coreward.rewards.expression import Node, difference, number
from megatron_coreward.rewards.units import NO_UNIT, Unit


@dataclass(frozen=True, slots=True)
class Scalar:
    """A number or expression, with the unit behind it; text: its LaTeX, without the unit."""

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


def assignments_of(names: list[str], values: list[Reading]) -> Assignments:
    pairs = sorted(zip(names, values, strict=True), key=lambda pair: pair[0])
    return Assignments(tuple(name for name, _ in pairs), tuple(value for _, value in pairs))


def half_line(operator: str, bound: Node) -> "Piece | Region":
    """What a bound leaves of the real line."""
    if operator == r"\ne":
        return Region("without", (REALS, Piece(bound, True, bound, True)))
    if operator in (">", r"\ge"):
        return Piece(bound, operator == r"\ge", _INFINITY, False)
    return Piece(_MINUS_INFINITY, False, bound, operator == r"\le")


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


_INFINITY = Node("constant", "infinity")
_MINUS_INFINITY = Node("multiply", args=(number(-1), _INFINITY))
REALS = Piece(_MINUS_INFINITY, False, _INFINITY, False)


def zero_form(equation: Equation) -> Node:
    """`lhs - rhs`."""
    return difference(equation.lhs, equation.rhs)
