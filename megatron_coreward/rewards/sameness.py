"""Whether two readings say the same, kind by kind.

Two of one kind are compared by that kind's rule, two of different kinds by a rule of the table `_ACROSS`, and without a
rule they are different. Scalars are compared by what the caller gives: exact arithmetic alone in the asking process,
everything in a comparison process.

Invariants: symmetric; no rule looks at how an answer is spelled, save for words.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

from megatron_coreward.rewards.expression import Node, difference, number, quotient
from megatron_coreward.rewards.intervals import pieces_of
from megatron_coreward.rewards.kinds import (
    Alternatives,
    Assignments,
    Choice,
    Clock,
    Congruence,
    Equation,
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
    Scalar,
    half_line,
    region_of,
    zero_form,
)
from megatron_coreward.rewards.units import NO_UNIT

T = TypeVar("T")


class Undecided(Exception):
    """The arithmetic at hand does not decide."""


class Arithmetic(Protocol):
    """How scalars are compared."""

    def step(self) -> None:
        """Two readings are compared. Raises Undecided if there were too many already."""

    def same(self, a: Node, b: Node) -> bool:
        """Whether two expressions have one value. Raises Undecided."""

    def order(self, a: Node, b: Node) -> int | None:
        """-1, 0 or 1 for less, equal or greater; None if one is no real number. Raises Undecided."""

    def proportional(self, a: Node, b: Node) -> int | None:
        """The sign of a constant c that is not 0 with a = c b; None if there is none. Raises Undecided."""

    def same_curve(self, a: Node, b: Node) -> bool:
        """Whether a = 0 and b = 0 have the same solutions. Raises Undecided."""

    def root(self, a: Node) -> Node | None:
        """The solution of a = 0 in its only variable, if a is linear in it; None if not. Raises Undecided."""

    def foreign(self, a: str, b: str) -> bool:
        """Whether the computer algebra system finds two LaTeX texts equivalent. Raises Undecided."""


def same(a: Reading, b: Reading, arithmetic: Arithmetic) -> bool:
    """Whether two readings say the same. Raises Undecided."""
    arithmetic.step()
    if a == b:
        return True
    if isinstance(a, Alternatives) or isinstance(b, Alternatives):
        readings = [x.readings if isinstance(x, Alternatives) else (x,) for x in (a, b)]
        return _any(lambda pair: same(*pair, arithmetic), [(x, y) for x in readings[0] for y in readings[1]])
    if type(a) is type(b):
        return _WITHIN[type(a)](a, b, arithmetic)
    for (first, second), rule in _ACROSS.items():
        for x, y in ((a, b), (b, a)):
            if isinstance(x, first) and isinstance(y, second):
                return rule(x, y, arithmetic)
    return False


# --- of one kind ------------------------------------------------------------------------------------------------------


def _scalars(a: Scalar, b: Scalar, arithmetic: Arithmetic) -> bool:
    if a.unit.agrees(b.unit):
        if arithmetic.same(a.node, b.node):
            return True
    elif {a.unit.dimension, b.unit.dimension} != {_DEGREES, _RADIANS}:
        return False
    if (a.unit.dimension == _DEGREES) == (b.unit.dimension == _DEGREES):
        return False
    in_radians = [_in_radians(x) if x.unit.dimension == _DEGREES else x.node for x in (a, b)]
    return arithmetic.same(in_radians[0], in_radians[1])


def _in_radians(angle: Scalar) -> Node:
    return Node("multiply", args=(angle.node, Node("constant", "pi"), number(Fraction(1, 180))))


_DEGREES, _RADIANS = (("deg", 1),), (("rad", 1),)


def _clocks(a: Clock, b: Clock, arithmetic: Arithmetic) -> bool:
    return a.parts == b.parts and (a.half == b.half or not a.half or not b.half)


def _ratios(a: Ratio, b: Ratio, arithmetic: Arithmetic) -> bool:
    """3 : 6 is 1 : 2; every term in proportion to the first."""
    if len(a.terms) != len(b.terms):
        return False
    return _all(
        lambda pair: arithmetic.same(
            Node("multiply", args=(pair[0], b.terms[0])), Node("multiply", args=(pair[1], a.terms[0]))
        ),
        list(zip(a.terms, b.terms, strict=True))[1:],
    )


def _item_lists(a: Items, b: Items, arithmetic: Arithmetic) -> bool:
    """Sets and lists in any order; tuples and intervals in theirs; a list may be a set or a tuple without brackets."""
    if "{}" in (a.brackets, b.brackets) or a.brackets == b.brackets == "":
        if not {a.brackets, b.brackets} <= {"{}", ""}:
            return False
        return _in_any_order(a.items, b.items, arithmetic)
    if a.brackets != b.brackets and {a.brackets, b.brackets} != {"()", ""}:
        return False
    return _in_order(a.items, b.items, arithmetic)


def _regions(a: Region, b: Region, arithmetic: Arithmetic) -> bool:
    if a.name and b.name and a.name != b.name:
        return False
    x, y = pieces_of(a, arithmetic.order), pieces_of(b, arithmetic.order)
    if x is None or y is None:
        return False
    return len(x) == len(y) and all(
        (p.low_closed, p.high_closed) == (q.low_closed, q.high_closed)
        and arithmetic.order(p.low, q.low) == arithmetic.order(p.high, q.high) == 0
        for p, q in zip(x, y, strict=True)
    )


def _matrices(a: Matrix, b: Matrix, arithmetic: Arithmetic) -> bool:
    if a.determinant != b.determinant or [len(row) for row in a.rows] != [len(row) for row in b.rows]:
        return False
    cells = [[cell for row in matrix.rows for cell in row] for matrix in (a, b)]
    return _in_order(cells[0], cells[1], arithmetic)


def _equations(a: Equation, b: Equation, arithmetic: Arithmetic) -> bool:
    if a.operator != b.operator:
        return False
    if (a.lhs, a.rhs) == (b.lhs, b.rhs):
        return True
    x, y = zero_form(a), zero_form(b)
    sign = arithmetic.proportional(x, y)
    if sign is not None:
        return a.operator in ("=", r"\ne") or sign > 0
    return a.operator == "=" and arithmetic.same_curve(x, y)


def _named(a: Named, b: Named, arithmetic: Arithmetic) -> bool:
    """Two equations by their solutions; other values by name and value."""
    if a.equation and b.equation and a.name and b.name and not (_is_assignment(a) and _is_assignment(b)):
        return _equations(a.equation, b.equation, arithmetic)
    return (not a.name or not b.name or a.name == b.name) and same(a.value, b.value, arithmetic)


def _is_assignment(named: Named) -> bool:
    """`x = 4`: one variable and a number."""
    equation = named.equation
    return equation is not None and equation.lhs.op == "symbol" and not equation.rhs.symbols()


def _assigned(a: Assignments, b: Assignments, arithmetic: Arithmetic) -> bool:
    return a.names == b.names and _in_order(a.values, b.values, arithmetic)


def _labelled(a: Labelled, b: Labelled, arithmetic: Arithmetic) -> bool:
    return a.letter == b.letter and same(a.value, b.value, arithmetic)


def _congruences(a: Congruence, b: Congruence, arithmetic: Arithmetic) -> bool:
    return (a.remainder, a.modulus) == (b.remainder, b.modulus) and (not a.name or not b.name or a.name == b.name)


def _foreigners(a: Foreign, b: Foreign, arithmetic: Arithmetic) -> bool:
    return arithmetic.foreign(a.text, b.text)


def _never(a: Reading, b: Reading, arithmetic: Arithmetic) -> bool:
    return False


_WITHIN: dict[type, Callable[..., bool]] = {
    Scalar: _scalars,
    Clock: _clocks,
    Ratio: _ratios,
    Items: _item_lists,
    Region: _regions,
    Matrix: _matrices,
    Equation: _equations,
    Named: _named,
    Assignments: _assigned,
    Labelled: _labelled,
    Congruence: _congruences,
    Foreign: _foreigners,
    **dict.fromkeys((Numeral, Choice, Phrase), _never),  # the same only if they are equal
}


# --- of different kinds -----------------------------------------------------------------------------------------------


def _name_and_equation(a: Named, b: Equation, arithmetic: Arithmetic) -> bool:
    return a.equation is not None and bool(a.name) and _equations(a.equation, b, arithmetic)


def _name_and_value(a: Named, b: Reading, arithmetic: Arithmetic) -> bool:
    """The question fixes the name: `x = 4` is 4; `2 + 2 = 4` is, if it is true."""
    if not a.name and a.equation and not arithmetic.same(a.equation.lhs, a.equation.rhs):
        return False
    return same(a.value, b, arithmetic)


def _solution(a: Equation, b: Scalar, arithmetic: Arithmetic) -> bool:
    """`2x = 10` is 5."""
    if a.operator != "=":
        return False
    form = zero_form(a)
    root = arithmetic.root(form) if len(form.symbols()) == len(form.variables()) == 1 and not b.node.symbols() else None
    return root is not None and arithmetic.same(root, b.node)


def _linear_inequality(a: Equation, b: Region, arithmetic: Arithmetic) -> bool:
    """`2x < 6` is `x < 3`."""
    form = zero_form(a)
    names = form.symbols()
    if a.operator not in (">", r"\ge") or len(names) != 1 or form.variables() != names:
        return False
    (name,) = names
    root = arithmetic.root(form)
    sign = root and arithmetic.proportional(form, difference(Node("symbol", name), root))
    if not root or not sign:
        return False
    operator = a.operator if sign > 0 else {">": "<", r"\ge": r"\le"}[a.operator]
    return _regions(Region("union", (half_line(operator, root),), name), b, arithmetic)


def _values_in_order(a: Assignments, b: Items, arithmetic: Arithmetic) -> bool:
    """`x = 1, y = 2` is `(1, 2)`."""
    return b.brackets in ("()", "") and _in_order(a.values, b.items, arithmetic)


def _one_value(a: Assignments, b: Scalar, arithmetic: Arithmetic) -> bool:
    """`x = y = 0` is 0."""
    return _all(lambda value: same(value, b, arithmetic), a.values)


def _vector(a: Matrix, b: Items, arithmetic: Arithmetic) -> bool:
    """A matrix of one row or one column is a tuple."""
    if b.brackets != "()" or not (len(a.rows) == 1 or all(len(row) == 1 for row in a.rows)):
        return False
    return _in_order([cell for row in a.rows for cell in row], b.items, arithmetic)


def _interval(a: Region, b: Items, arithmetic: Arithmetic) -> bool:
    other = region_of(b)
    return other is not None and _regions(a, other, arithmetic)


def _only_member(a: Items, b: Scalar, arithmetic: Arithmetic) -> bool:
    """`\\{5\\}` is 5."""
    if a.brackets == "{}" and b.node.symbols():  # the fractional part of x
        return False
    return a.brackets in ("{}", "") and len(a.items) == 1 and same(a.items[0], b, arithmetic)


def _quotient(a: Ratio, b: Scalar, arithmetic: Arithmetic) -> bool:
    """3 : 4 is 3/4, but no ratio of three is a number."""
    return len(a.terms) == 2 and not b.unit.dimension and arithmetic.same(quotient(*a.terms), b.node)


def _ratio_and_clock(a: Ratio, b: Clock, arithmetic: Arithmetic) -> bool:
    """2 : 3 is 10:15, which looks like a time."""
    hours, minutes, seconds = b.parts
    clock = Ratio((number(hours), number(minutes)))
    if b.half or seconds or minutes < 10 or _all_digits(a):
        return False
    return _ratios(a, clock, arithmetic)


def _all_digits(ratio: Ratio) -> bool:
    """Whether the second term has two digits, as minutes have: `2:60` is no other way to write `1:30`."""
    return ratio.terms[-1].op == "number" and ratio.terms[-1].number >= 10


def _digits(a: Numeral, b: Scalar, arithmetic: Arithmetic) -> bool:
    """The question fixes the base."""
    return a.digits.isdigit() and arithmetic.same(number(int(a.digits)), b.node) and b.node.op == "number"


def _label_and_letter(a: Labelled, b: Choice, arithmetic: Arithmetic) -> bool:
    return a.letter == b.letter


def _label_and_value(a: Labelled, b: Reading, arithmetic: Arithmetic) -> bool:
    return same(a.value, b, arithmetic)


def _remainder(a: Congruence, b: Scalar, arithmetic: Arithmetic) -> bool:
    """The question fixes the modulus."""
    return b.unit == NO_UNIT and arithmetic.same(number(a.remainder), b.node)


def _nothing(a: Phrase, b: Items, arithmetic: Arithmetic) -> bool:
    """No solution is the empty set of solutions."""
    return a.text == "nosolution" and b.brackets == "{}" and not b.items


def _foreign_and_scalar(a: Foreign, b: Scalar, arithmetic: Arithmetic) -> bool:
    return arithmetic.foreign(a.text, b.text)


_ACROSS: dict[tuple[type, type], Callable[..., bool]] = {
    (Labelled, Choice): _label_and_letter,
    (Labelled, object): _label_and_value,
    (Named, Equation): _name_and_equation,
    (Named, object): _name_and_value,
    (Equation, Scalar): _solution,
    (Equation, Region): _linear_inequality,
    (Assignments, Items): _values_in_order,
    (Assignments, Scalar): _one_value,
    (Matrix, Items): _vector,
    (Region, Items): _interval,
    (Items, Scalar): _only_member,
    (Ratio, Scalar): _quotient,
    (Ratio, Clock): _ratio_and_clock,
    (Numeral, Scalar): _digits,
    (Congruence, Scalar): _remainder,
    (Phrase, Items): _nothing,
    (Foreign, Scalar): _foreign_and_scalar,
}


# --- parts ------------------------------------------------------------------------------------------------------------


def _any(holds: Callable[[T], bool], cases: Sequence[T]) -> bool:
    """Whether one case holds; undecided only if that matters."""
    undecided: Undecided | None = None
    for case in cases:
        try:
            if holds(case):
                return True
        except Undecided as error:
            undecided = error
    if undecided:
        raise undecided
    return False


def _all(holds: Callable[[T], bool], cases: Sequence[T]) -> bool:
    """Whether all cases hold; undecided only if that matters."""
    return not _any(lambda case: not holds(case), cases)


def _in_order(a: Sequence[Reading], b: Sequence[Reading], arithmetic: Arithmetic) -> bool:
    return len(a) == len(b) and _all(lambda pair: same(*pair, arithmetic), list(zip(a, b, strict=True)))


def _in_any_order(a: Sequence[Reading], b: Sequence[Reading], arithmetic: Arithmetic) -> bool:
    """Whether the items can be paired: what is equal already goes first, a matching is found for the others."""
    if len(a) != len(b):
        return False
    left, right = list(a), list(b)
    for item in a:
        if item in right:
            right.remove(item)
            left.remove(item)
    partner: dict[int, int] = {}  # of right by left

    def paired(i: int, tried: set[int]) -> bool:
        for j in range(len(right)):
            if j not in tried and fits[i][j]:
                tried.add(j)
                if j not in partner or paired(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    fits = []
    for item in left:
        fits.append([same(item, other, arithmetic) for other in right])
        if not any(fits[-1]):
            return False
    return all(paired(i, set()) for i in range(len(left)))
