r"""Exact rational values of scalar expressions, at fixed points of their variables.

Invariants: exact or nothing (None): no rounding, no size that takes long to compute; a value depends on the expression
alone. An uninterpreted function is a fixed polynomial with coefficients from its name: equal to itself alone.
"""

import hashlib
import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_coreward.rewards.expression import Node

MAX_BITS = 200_000  # of the numerator or denominator of an exact value
MAX_FACTORIAL = 20_000  # computed exactly
NUM_POINTS = 8


class Undefined(ArithmeticError):
    """The expression has no value at this point, or none that can be computed."""


class _Irrational(Exception):
    """The value is no rational number of a size that is computed exactly."""


@lru_cache(maxsize=65536)
def exact_value(node: Node, index: int = 0) -> Fraction | None:
    """The rational value at the point of that index (0 to `NUM_POINTS` - 1); None if it is irrational or too large.

    Raises Undefined for a division by zero and the like.
    """
    try:
        return _exact(node, index)
    except _Irrational:
        return None


@lru_cache(maxsize=4096)
def coordinate(name: str, index: int) -> Fraction:
    """Where a variable is evaluated, by its name alone: the first points are positive, the others of either sign."""
    name_and_index = f"{name}/{index}".encode(errors="surrogatepass")
    draw = int.from_bytes(hashlib.blake2b(name_and_index, digest_size=4).digest(), "big")
    value = Fraction(draw % 9973 + 1, 9973) * (1, 3, 10, 3, 3, 1, 2, 5)[index] + Fraction(1, 7)
    return -value if index == 3 or (index > 3 and draw >> 20 & 1) else value


@lru_cache(maxsize=4096)
def _coefficients(name: str, count: int) -> tuple[Fraction, ...]:
    return tuple(coordinate(f"{name}()/{k}", 1) for k in range(count))


def _exact(node: Node, index: int) -> Fraction:
    match node.op:
        case "number":
            return node.number
        case "symbol":
            return coordinate(node.name, index)
        case "add":
            total = Fraction(0)
            for arg in node.args:
                total = _bounded(total + _exact(arg, index))
            return total
        case "multiply":
            product = Fraction(1)
            for arg in node.args:
                product = _bounded(product * _exact(arg, index))
            return product
        case "power":
            return _exact_power(_exact(node.args[0], index), _exact(node.args[1], index))
        case "call":
            return _exact_call(node.name, [_exact(arg, index) for arg in node.args])
        case "free":
            args = [_exact(arg, index) for arg in node.args]
            return _bounded(uninterpreted(node.name, args))
    raise _Irrational


def uninterpreted(name: str, args: list[Any], number: Any = Fraction) -> Any:
    """The value of an uninterpreted function: a polynomial of degree 3; `number` makes its coefficients."""
    coefficients = [number(value) for value in _coefficients(f"{name}/{len(args)}", 1 + 3 * len(args))]
    total = coefficients[0]
    for k, arg in enumerate(args):
        for power in (1, 2, 3):
            total = total + coefficients[3 * k + power] * arg**power
    return total


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _Irrational
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        power = exponent.numerator
        if base == 0:
            if power <= 0:
                raise Undefined
            return base
        if abs(base) == 1:
            return base if power % 2 else Fraction(1)
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(power) > MAX_BITS:
            raise _Irrational
        return base**power
    return _exact_power(_exact_root(base, exponent.denominator), Fraction(exponent.numerator))


def _exact_root(value: Fraction, index: int) -> Fraction:
    if index < 1 or (value < 0 and index % 2 == 0):
        raise _Irrational
    if index > 64 and value not in (0, 1, -1):
        raise _Irrational
    above, below = _integer_root(abs(value.numerator), index), _integer_root(value.denominator, index)
    return Fraction(above if value >= 0 else -above, below)


def _integer_root(value: int, index: int) -> int:
    """The exact root of a natural number; raises _Irrational if it has none."""
    root = math.isqrt(value) if index == 2 else _newton_root(value, index)
    if root**index != value:
        raise _Irrational
    return root


def _newton_root(value: int, index: int) -> int:
    if value < 2:
        return value
    guess = 1 << -(-value.bit_length() // index)
    while True:
        better = ((index - 1) * guess + value // guess ** (index - 1)) // index
        if better >= guess:
            return guess
        guess = better


def _exact_call(name: str, args: list[Fraction]) -> Fraction:
    first = args[0]
    match name:
        case "abs":
            return abs(first)
        case "floor":
            return Fraction(math.floor(first))
        case "ceil":
            return Fraction(math.ceil(first))
        case "root":
            if args[1].denominator != 1:
                raise _Irrational
            return _exact_root(first, args[1].numerator)
        case "factorial":
            if first.denominator != 1 or not 0 <= first <= MAX_FACTORIAL:
                raise _Irrational
            return Fraction(math.factorial(first.numerator))
        case "binom":
            n, k = args
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= MAX_FACTORIAL:
                raise _Irrational
            return Fraction(math.comb(n.numerator, k.numerator))
        case "gcd" | "lcm":
            if any(arg.denominator != 1 for arg in args):
                return _bounded(uninterpreted(name, args))  # of variables
            of = math.gcd if name == "gcd" else math.lcm
            return Fraction(of(*(arg.numerator for arg in args)))
        case "max":
            return max(args)
        case "min":
            return min(args)
        case "exp" | "sin" | "tan" | "asin" | "atan" | "sinh" | "tanh" if first == 0:
            return Fraction(name == "exp")
        case "cos" | "cosh" if first == 0:
            return Fraction(1)
        case "ln" if first == 1:
            return Fraction(0)
    raise _Irrational
