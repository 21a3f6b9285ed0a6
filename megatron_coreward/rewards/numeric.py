r"""Whether two scalar expressions have the same value: exactly if both are rational, else with proven digits.

An expression without variables is a number, one with variables is evaluated at fixed points. Rational values are
compared as fractions. All others are computed as balls (a value and a bound on its error): two values differ as soon as
their balls are apart, whatever their size, and are the same if the balls still meet at the largest precision.

Invariants: no floating-point tolerance decides; a value never depends on what was evaluated before. Uninterpreted
functions are evaluated as fixed polynomials with coefficients from their names: equal to themselves alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp, mpc, mpf

from megatron_coreward.rewards.exact import NUM_POINTS, Undefined, exact_value, uninterpreted
from megatron_coreward.rewards.expression import Node

DIGITS = (40, 300, 1200)  # precisions that are tried in turn
POINTS = (NUM_POINTS, 3, 1)  # at how many points expressions with variables are compared at each of them
MAX_EXPONENT_BITS = 2_000  # of the binary exponent of any value: 2^(2^2000)


class _Unsure(Exception):
    """The precision does not suffice."""


@dataclass(frozen=True, slots=True)
class Ball:
    """A real or complex number: `value` up to an error of `radius`."""

    value: Any
    radius: Any


def same_value(a: Node, b: Node) -> bool:
    """Whether two expressions are equal: as numbers, or as functions of all their variables.

    Functions are compared at points at which both are real; if there are none, or the imaginary unit occurs, as
    complex ones.
    """
    if a == b:
        return True
    infinite = _infinity(a), _infinity(b)
    if any(infinite):
        return infinite[0] == infinite[1]
    has_variables = bool(a.symbols() | b.symbols())
    domains = (True,) if a.has_imaginary_unit() or b.has_imaginary_unit() else (False, True)
    for complex_numbers in domains:
        agreed: set[int] = set()
        open_points = list(range(NUM_POINTS if has_variables else 1))
        for digits, most in zip(DIGITS, POINTS, strict=True):
            for index in open_points[:most]:
                verdict = _same_at(a, b, index, complex_numbers, digits)
                if verdict is False:
                    return False
                if verdict is None:  # no value at this point
                    agreed.discard(index)
                    open_points = [other for other in open_points if other != index]
                else:
                    agreed.add(index)
            open_points = [index for index in open_points if not _both_exact(a, b, index)]
        if agreed:
            return True
    return False


def compare_constants(a: Node, b: Node) -> int | None:
    """-1, 0 or 1 as the real number `a` is less than, equal to or greater than `b`; None if one is no real number."""
    if a.variables() or b.variables():
        return None
    signs = _infinity(a), _infinity(b)
    if any(signs):
        return (signs[0] > signs[1]) - (signs[0] < signs[1])
    try:
        exact_a, exact_b = exact_value(a), exact_value(b)
        if exact_a is not None and exact_b is not None:
            return (exact_a > exact_b) - (exact_a < exact_b)
        for digits in DIGITS:
            x, y = _ball(a, 0, False, digits), _ball(b, 0, False, digits)
            if x is not None and y is not None and (mp.im(x.value) or mp.im(y.value)):
                return None
            if x is not None and y is not None and abs(x.value - y.value) > x.radius + y.radius:
                return 1 if x.value > y.value else -1
        return None if x is None or y is None else 0
    except Undefined:
        return None


def _both_exact(a: Node, b: Node, index: int) -> bool:
    try:
        return exact_value(a, index) is not None and exact_value(b, index) is not None
    except Undefined:
        return False


def _same_at(a: Node, b: Node, index: int, complex_numbers: bool, digits: int) -> bool | None:
    """At one point, as far as that many digits decide; None if one of them has no value there."""
    try:
        exact_a, exact_b = exact_value(a, index), exact_value(b, index)
        if exact_a is not None and exact_b is not None:
            return exact_a == exact_b
        x, y = _ball(a, index, complex_numbers, digits), _ball(b, index, complex_numbers, digits)
    except Undefined:
        return None
    if x is None or y is None:
        return True if digits != DIGITS[-1] else None
    with mp.workdps(digits + 10):
        reach = x.radius + y.radius
        if abs(x.value - y.value) > reach:
            return False
    # Numbers with more digits than the last precision may still differ in the ones that are left out.
    return None if digits == DIGITS[-1] and reach > 1 else True


def _infinity(node: Node) -> int:
    if node == Node("constant", "infinity"):
        return 1
    return -1 if node.op == "multiply" and len(node.args) == 2 and node.args[1] == Node("constant", "infinity") else 0


@lru_cache(maxsize=16384)
def _ball(node: Node, index: int, complex_numbers: bool, digits: int) -> Ball | None:
    """At that many digits; None if they do not suffice. Raises Undefined."""
    with mp.workdps(digits):
        try:
            return _Balls(index, complex_numbers, digits == DIGITS[-1]).ball(node)
        except _Unsure:
            return None
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise Undefined from error


def _mpf(value: Fraction) -> Any:
    return mpf(value.numerator) / value.denominator


class _Balls:
    """Evaluation with first-order error bounds at the precision of the mpmath context."""

    def __init__(self, index: int, complex_numbers: bool, final: bool) -> None:
        self._index = index
        self._complex = complex_numbers
        self._final = final  # the last precision: what is still unsure is taken for zero or for the integer

    def ball(self, node: Node) -> Ball:
        exact = exact_value(node, self._index)
        if exact is not None:
            return self._rounded(_mpf(exact), mpf(0))
        match node.op:
            case "constant":
                return self._constant(node.name)
            case "number":
                return self._rounded(_mpf(node.number), mpf(0))
            case "add":
                balls = [self.ball(arg) for arg in node.args]
                largest = max(abs(ball.value) for ball in balls)
                total = sum((ball.value for ball in balls), mpf(0))
                return Ball(total, sum((ball.radius for ball in balls), mpf(0)) + len(balls) * largest * mp.eps)
            case "multiply":
                product = self._rounded(mpf(1), mpf(0))
                for arg in node.args:
                    product = self._product(product, self.ball(arg))
                return product
            case "power":
                return self._power(self.ball(node.args[0]), node.args[1])
            case "call":
                return self._call(node.name, [self.ball(arg) for arg in node.args], node)
            case "free":
                balls = [self.ball(arg) for arg in node.args]
                value = uninterpreted(node.name, [ball.value for ball in balls], _mpf)
                slope = sum((60 * ball.radius * (1 + abs(ball.value)) ** 2 for ball in balls), mpf(0))
                return self._rounded(value, slope)
        raise Undefined

    def _rounded(self, value: Any, radius: Any) -> Ball:
        if not mp.isfinite(value):
            raise Undefined
        size = mpf(abs(value))
        if size and abs(mp.frexp(size)[1]).bit_length() > MAX_EXPONENT_BITS:
            raise Undefined
        return Ball(value, radius + 4 * size * mp.eps)

    def _constant(self, name: str) -> Ball:
        if name == "infinity":
            raise Undefined
        return self._rounded({"pi": +mp.pi, "e": +mp.e, "i": mpc(0, 1)}[name], mpf(0))

    def _product(self, a: Ball, b: Ball) -> Ball:
        radius = abs(a.value) * b.radius + abs(b.value) * a.radius + a.radius * b.radius
        return self._rounded(a.value * b.value, radius)

    def _nonzero(self, ball: Ball) -> None:
        if abs(ball.value) <= 2 * ball.radius:
            if self._final:
                raise Undefined
            raise _Unsure

    def _power(self, base: Ball, exponent: Node) -> Ball:
        power = exact_value(exponent, self._index)
        if power is not None and power.denominator == 1 and abs(power) < 2**64:
            if power < 0:
                self._nonzero(base)
            if abs(base.value) <= 2 * base.radius:  # around zero
                return Ball(base.value ** int(power), (abs(base.value) + base.radius) ** int(power))
            self._check_size(base.value, mpf(int(power)))
            value = base.value ** int(power)
            return self._rounded(value, abs(value) * abs(int(power)) * base.radius / abs(base.value))
        self._nonzero(base)
        if power is not None and power.denominator % 2 and self._is_real(base) and base.value < 0 and not self._complex:
            root = self._power(Ball(-base.value, base.radius), exponent)
            return Ball(-root.value, root.radius) if power.numerator % 2 else root
        raised = self.ball(exponent)
        self._in_domain(base)
        self._check_size(base.value, raised.value)
        value = mp.power(base.value, raised.value)
        logarithm = abs(mp.log(abs(base.value))) + 4
        relative = abs(raised.value) * base.radius / abs(base.value) + raised.radius * logarithm
        return self._rounded(value, abs(value) * (relative + abs(raised.value) * logarithm * mp.eps))

    def _check_size(self, base: Any, power: Any) -> None:
        """Raises Undefined before a power is computed that no machine can hold."""
        exponent = abs(power) * (abs(mp.log(abs(base), 2)) + 1) if base else mpf(0)
        if exponent > mpf(2) ** MAX_EXPONENT_BITS:
            raise Undefined
        if exponent > mpf(2) ** (mp.prec // 2):  # the fraction of so large an exponent would be lost
            if self._final:
                raise Undefined
            raise _Unsure

    @staticmethod
    def _is_real(ball: Ball) -> bool:
        return not isinstance(ball.value, mpc) or ball.value.imag == 0

    def _in_domain(self, ball: Ball) -> None:
        """Roots and logarithms of negative numbers have no real value."""
        if not self._complex and self._is_real(ball) and mp.re(ball.value) < 0:
            raise Undefined

    def _call(self, name: str, balls: list[Ball], node: Node) -> Ball:
        """A function of `expression.FUNCTIONS`. Raises Undefined for one that has no proven digits."""
        method = _FUNCTIONS.get(name)
        if method is None:
            raise Undefined
        return method(self, name, balls, node)

    def _root(self, name: str, balls: list[Ball], node: Node) -> Ball:
        first = balls[0]
        x, r = first.value, first.radius
        index = exact_value(node.args[1], self._index)
        if index is None or index == 0:
            raise Undefined
        if abs(x) <= 2 * r:
            return Ball(mpf(0), (abs(x) + r) ** _mpf(1 / index)) if index > 0 else self._unsure()
        if not self._complex and self._is_real(first) and mp.re(x) < 0 and index.numerator % 2 == 0:
            raise Undefined
        return self._power(first, Node("number", number=1 / index))

    def _abs(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return Ball(abs(balls[0].value), balls[0].radius)

    def _exp(self, name: str, balls: list[Ball], node: Node) -> Ball:
        x, r = balls[0].value, balls[0].radius
        self._check_size(mp.e, x)
        value = mp.exp(x)
        return self._rounded(value, abs(value) * (r + abs(x) * mp.eps))

    def _logarithm(self, ball: Ball) -> Ball:
        self._nonzero(ball)
        self._in_domain(ball)
        return self._rounded(mp.log(ball.value), ball.radius / abs(ball.value))

    def _ln(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return self._logarithm(balls[0])

    def _log(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return self._product(self._logarithm(balls[0]), self._inverse(self._logarithm(balls[1])))

    def _sine_or_cosine(self, name: str, balls: list[Ball], node: Node) -> Ball:
        x, r = balls[0].value, balls[0].radius
        if abs(mp.im(x)) > 10**6:
            raise Undefined
        self._enough_for_period(balls[0])
        value = mp.sin(x) if name == "sin" else mp.cos(x)
        growth = mp.cosh(mp.im(x)) if isinstance(x, mpc) else mpf(1)
        return Ball(value, (r + (abs(x) + 2) * mp.eps) * growth)

    def _quotient_of_sines(self, name: str, balls: list[Ball], node: Node) -> Ball:
        sine, cosine = (self._sine_or_cosine(which, balls, node) for which in ("sin", "cos"))
        above = {"tan": sine, "cot": cosine}.get(name, Ball(mpf(1), mpf(0)))
        return self._product(above, self._inverse(cosine if name in ("tan", "sec") else sine))

    def _hyperbolic(self, name: str, balls: list[Ball], node: Node) -> Ball:
        value = {"sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh}[name](self._moderate(balls[0].value))
        return self._rounded(value, (1 + abs(value)) * 2 * balls[0].radius)

    def _arc(self, name: str, balls: list[Ball], node: Node) -> Ball:
        x, r = balls[0].value, balls[0].radius
        if not self._complex and abs(x) - r > 1:
            raise Undefined
        x = max(min(x, mpf(1)), mpf(-1)) if not self._complex else x
        value = mp.asin(x) if name == "asin" else mp.acos(x)
        steep = abs(1 - x * x)  # the slope is one over its root
        return self._rounded(value, mp.sqrt(2 * r) if steep < 4 * r else 2 * r / mp.sqrt(steep))

    def _arctangent(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return self._rounded(mp.atan(balls[0].value), balls[0].radius)

    def _rounding(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return self._whole(balls[0], math.floor if name == "floor" else math.ceil)

    def _factorial(self, name: str, balls: list[Ball], node: Node) -> Ball:
        return self._gamma(Ball(balls[0].value + 1, balls[0].radius))

    def _binomial(self, name: str, balls: list[Ball], node: Node) -> Ball:
        n, k = balls
        above = self._gamma(Ball(n.value + 1, n.radius))
        below = self._gamma(Ball(k.value + 1, k.radius))
        rest = self._gamma(Ball(n.value - k.value + 1, n.radius + k.radius))
        return self._product(above, self._inverse(self._product(below, rest)))

    def _extreme(self, name: str, balls: list[Ball], node: Node) -> Ball:
        if not all(self._is_real(ball) for ball in balls):
            raise Undefined
        chosen = (max if name == "max" else min)(balls, key=lambda ball: ball.value)
        return Ball(chosen.value, max(ball.radius for ball in balls))

    def _unsure(self) -> Ball:
        if self._final:
            raise Undefined
        raise _Unsure

    def _moderate(self, x: Any) -> Any:
        if abs(x) > 10**9:
            raise Undefined
        return x

    def _enough_for_period(self, ball: Ball) -> None:
        if ball.radius > 1:
            self._unsure()

    def _inverse(self, ball: Ball) -> Ball:
        self._nonzero(ball)
        value = 1 / ball.value
        return self._rounded(value, 2 * ball.radius * abs(value) ** 2)

    def _gamma(self, ball: Ball) -> Ball:
        if abs(ball.value) > 10**12:
            raise Undefined
        value = mp.gamma(ball.value)
        slope = abs(value) * (mp.log(abs(ball.value) + 2) + 2)
        return self._rounded(value, ball.radius * slope + abs(value) * abs(ball.value) * 64 * mp.eps)

    def _whole(self, ball: Ball, rounding: Callable[[Any], int]) -> Ball:
        if not self._is_real(ball):
            raise Undefined
        low, high = rounding(ball.value - ball.radius), rounding(ball.value + ball.radius)
        if low != high:
            if not self._final:
                raise _Unsure
            return self._rounded(mpf(int(mp.nint(ball.value))), mpf(0))
        return self._rounded(mpf(low), mpf(0))


_FUNCTIONS: dict[str, Callable[[_Balls, str, list[Ball], Node], Ball]] = {
    "root": _Balls._root,
    "abs": _Balls._abs,
    "exp": _Balls._exp,
    "ln": _Balls._ln,
    "log": _Balls._log,
    **dict.fromkeys(("sin", "cos"), _Balls._sine_or_cosine),
    **dict.fromkeys(("tan", "cot", "sec", "csc"), _Balls._quotient_of_sines),
    **dict.fromkeys(("sinh", "cosh", "tanh"), _Balls._hyperbolic),
    **dict.fromkeys(("asin", "acos"), _Balls._arc),
    "atan": _Balls._arctangent,
    **dict.fromkeys(("floor", "ceil"), _Balls._rounding),
    "factorial": _Balls._factorial,
    "binom": _Balls._binomial,
    **dict.fromkeys(("max", "min"), _Balls._extreme),
}
