"""The two ways to compare scalars: with exact rational numbers alone, and with everything.

`Quick` decides in the asking process, in microseconds, and raises Undecided for all that may take longer. `Full` is for
a comparison process with limits on time and memory.

Invariants: `Quick` decides nothing otherwise than `Full`; neither remembers a verdict.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction

from megatron_coreward.rewards.exact import Undefined, coordinate, exact_value
from megatron_coreward.rewards.expression import Node, difference, number, quotient
from megatron_coreward.rewards.sameness import Undecided

MAX_QUICK_NODES = 40
MAX_QUICK_EXPONENT = 1000
MAX_QUICK_STEPS = 500  # pairs of readings within one comparison


def plain_value(node: Node) -> Fraction | None:
    """The value of a number as people write it (`3/4`, `1.5e3`, `10^{20}`, `2\\frac{1}{2}`), None for the rest."""
    budget = [MAX_QUICK_NODES]
    try:
        return exact_value(node) if _is_plain(node, budget) else None
    except Undefined:
        return None


def _is_plain(node: Node, budget: list[int]) -> bool:
    budget[0] -= 1
    if budget[0] < 0:
        return False
    if node.op == "number":
        return max(node.number.numerator.bit_length(), node.number.denominator.bit_length()) < 5000
    if node.op == "power":
        base, exponent = node.args
        if exponent.op != "number" or abs(exponent.number) > MAX_QUICK_EXPONENT or exponent.number.denominator != 1:
            return False
        return base.op == "number" and _is_plain(base, budget) if exponent.number != -1 else _is_plain(base, budget)
    return node.op in ("add", "multiply") and all(_is_plain(arg, budget) for arg in node.args)


class Quick:
    """Exact arithmetic on plain numbers; one object for one comparison."""

    def __init__(self) -> None:
        self._steps = MAX_QUICK_STEPS

    def step(self) -> None:
        """Called for every pair of readings that is compared."""
        self._steps -= 1
        if self._steps < 0:
            raise Undecided

    def same(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        x, y = plain_value(a), plain_value(b)
        if x is None or y is None:
            raise Undecided
        return x == y

    def order(self, a: Node, b: Node) -> int | None:
        if a == b:
            return 0
        x, y = plain_value(a), plain_value(b)
        if x is None or y is None:
            raise Undecided
        return (x > y) - (x < y)

    def proportional(self, a: Node, b: Node) -> int | None:
        raise Undecided

    def same_curve(self, a: Node, b: Node) -> bool:
        raise Undecided

    def root(self, a: Node) -> Node | None:
        raise Undecided

    def foreign(self, a: str, b: str) -> bool:
        raise Undecided


class Full:
    """Everything: exact values, proven digits, and math-verify for what only a computer algebra system reads."""

    def __init__(self, foreign: Callable[[str, str], bool]) -> None:
        from megatron_coreward.rewards import numeric  # needs mpmath, which the asking process does without

        self.same = numeric.same_value
        self.order = numeric.compare_constants
        self.foreign = foreign

    def step(self) -> None:
        """No bound of its own: the process has one."""

    def proportional(self, a: Node, b: Node) -> int | None:
        """By the ratio at one point, which must be the ratio everywhere."""
        if not a.variables() | b.variables():  # true or false, or of one unknown value: only the same is the same
            return 1 if self.same(a, b) else None
        for index in (1, 2):
            ratio = quotient(_at(a, index), _at(b, index))
            sign = self.order(ratio, number(0))
            if sign:
                return sign if self.same(a, Node("multiply", args=(ratio, b))) else None
        return None

    def same_curve(self, a: Node, b: Node) -> bool:
        """By solving both for a variable in which they are linear: each solution must solve the other."""
        for name in sorted(a.variables() & b.variables()):
            solutions = [_linear_solution(form, name, self.same) for form in (a, b)]
            if solutions[0] is not None and solutions[1] is not None:
                return self.same(solutions[0], solutions[1])
        return False

    def root(self, a: Node) -> Node | None:
        (name,) = a.variables()
        return _linear_solution(a, name, self.same)


def _at(node: Node, index: int) -> Node:
    """With every variable replaced by its coordinate at a point."""
    return _substituted(node, {name: number(coordinate(name, index)) for name in node.variables()})


def _substituted(node: Node, values: Mapping[str, Node]) -> Node:
    if node.op == "symbol":
        return values.get(node.name, node)
    return Node(node.op, node.name, node.number, tuple(_substituted(arg, values) for arg in node.args))


def _linear_solution(form: Node, name: str, same: Callable[[Node, Node], bool]) -> Node | None:
    """Of form = 0 in a variable that it is linear in; None if it is not."""
    at_0, at_1, at_5 = (_substituted(form, {name: number(value)}) for value in (0, 1, 5))
    slope = difference(at_1, at_0)
    if slope.symbols() and _meet(slope, at_0, same):  # `ab = 0` has more solutions than `a = 0`
        return None
    linear = Node("add", args=(at_0, Node("multiply", args=(number(5), slope))))
    if not same(at_5, linear) or same(slope, number(0)):
        return None
    return quotient(Node("multiply", args=(number(-1), at_0)), slope)


def _meet(slope: Node, rest: Node, same: Callable[[Node, Node], bool]) -> bool:
    """Whether slope and rest may be 0 together; only a slope that is linear in some variable is looked into."""
    for name in sorted(slope.variables()):
        low, high, far = (_substituted(slope, {name: number(value)}) for value in (0, 1, 5))
        step = difference(high, low)
        if step.symbols() and not same(step, _at(step, 1)):
            continue
        if same(step, number(0)) or not same(far, Node("add", args=(low, Node("multiply", args=(number(5), step))))):
            continue
        root = quotient(Node("multiply", args=(number(-1), low)), step)
        return same(_substituted(rest, {name: root}), number(0))
    return not same(slope, _at(slope, 1))  # a constant in disguise never is 0
