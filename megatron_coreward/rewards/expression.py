"""The tree of a scalar expression, and the functions that have an arithmetic meaning.

Numbers are exact. What has no arithmetic meaning here (a prime, an overline, an unknown function) is an uninterpreted
application, which is equal to itself alone.
"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    op: `number` (value in `number`), `symbol` and `constant` (name in `name`: constants are pi, e, i and infinity),
    `add`, `multiply`, `power`, `call` (a function of `FUNCTIONS`), `free` (an uninterpreted application).
    """

    op: str
    name: str = ""
    number: Fraction = Fraction(0)
    args: tuple["Node", ...] = ()

    def symbols(self) -> frozenset[str]:
        """Names of the variables, and of the uninterpreted functions."""
        own = frozenset({self.name}) if self.op in ("symbol", "free") else frozenset[str]()
        return own.union(*(arg.symbols() for arg in self.args))

    def variables(self) -> frozenset[str]:
        """Names of the variables alone."""
        own = frozenset({self.name}) if self.op == "symbol" else frozenset[str]()
        return own.union(*(arg.variables() for arg in self.args))

    def has_imaginary_unit(self) -> bool:
        return (self.op, self.name) == ("constant", "i") or any(arg.has_imaginary_unit() for arg in self.args)


def number(value: Fraction | int) -> Node:
    return Node("number", number=Fraction(value))


def negative(node: Node) -> Node:
    return number(-node.number) if node.op == "number" else Node("multiply", args=(number(-1), node))


def quotient(above: Node, below: Node) -> Node:
    return Node("multiply", args=(above, Node("power", args=(below, number(-1)))))


def difference(a: Node, b: Node) -> Node:
    return Node("add", args=(a, negative(b)))


TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
# Functions that are computed, with the numbers of arguments that they take.
FUNCTIONS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        (*TRIGONOMETRIC, "asin", "acos", "atan", "exp", "cis", "ln", "abs", "floor", "ceil", "factorial"), (1, 1)
    ),
    **dict.fromkeys(("log", "root", "binom", "mod"), (2, 2)),
    **dict.fromkeys(("gcd", "lcm", "max", "min"), (1, 99)),
}
