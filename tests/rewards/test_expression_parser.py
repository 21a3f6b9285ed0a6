"""Scalar LaTeX is read whole or not at all, by the precedence that mathematics and TeX give it."""

from fractions import Fraction

import pytest

from megatron_coreward.rewards.exact import Undefined, exact_value
from megatron_coreward.rewards.expression_parser import Unreadable, read_expression
from megatron_coreward.rewards.numeric import compare_constants, same_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-12", Fraction(-12)),
        ("2.50", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("1.5e-3", Fraction(3, 2000)),
        (r"1.5\times10^{3}", Fraction(1500)),
        (r"\frac{-1.5}{3}", Fraction(-1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        ("2^{-2}", Fraction(1, 4)),
        (r"\frac12 3", Fraction(3, 2)),
        (r"\sqrt16", Fraction(4)),
        ("2^10", Fraction(1024)),
        ("-2^2", Fraction(-4)),
        ("2^{3^2}", Fraction(512)),
        ("6/2(3)", Fraction(9)),
        ("5!", Fraction(120)),
        (r"\binom{5}{2}", Fraction(10)),
        ("8^{1/3}", Fraction(2)),
        (r"\lfloor 3.7\rfloor", Fraction(3)),
        (r"\gcd(12,18)", Fraction(6)),
        ("|-3|", Fraction(3)),
    ],
)
def test_rational_expressions_have_their_exact_value(text: str, value: Fraction) -> None:
    assert exact_value(read_expression(text)) == value


@pytest.mark.parametrize(
    "text", ["", "1 2", "x+", "(1", r"\frac{1}", "1..2", r"\unknown{x}", "٣", "2,3", "{", "x=1", "1.2.3"]
)
def test_what_is_no_scalar_expression_is_refused_and_never_half_read(text: str) -> None:
    with pytest.raises(Unreadable):
        read_expression(text)


@pytest.mark.parametrize("text", ["1/0", r"\frac{1}{1-1}", "0^{-1}"])
def test_a_division_by_zero_has_no_value(text: str) -> None:
    with pytest.raises(Undefined):
        exact_value(read_expression(text))
    assert not same_value(read_expression(text), read_expression("1"))


@pytest.mark.parametrize("text", [r"\sqrt2", r"\pi", "9^{9^9}", "10^{1000000}", "1000000!"])
def test_what_is_irrational_or_huge_has_no_exact_value(text: str) -> None:
    assert exact_value(read_expression(text)) is None


@pytest.mark.parametrize(
    ("a", "b", "order"),
    [
        ("1", "2", -1),
        (r"\sqrt2", "1.4142135623730951", -1),
        (r"\sqrt8", r"2\sqrt2", 0),
        (r"\infty", "9^{9^9}", 1),
        (r"\pi", r"\frac{22}{7}", -1),
        (r"\sqrt{-1}", "1", None),
        ("x", "1", None),
    ],
)
def test_real_numbers_are_ordered(a: str, b: str, order: int | None) -> None:
    assert compare_constants(read_expression(a), read_expression(b)) == order


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["9^{9^{9^{9^9}}}", "(9^{9^9})!", r"\sin(9^{9^{9^9}})", "x^{9^{9^9}}", "((9!)!)!", r"2^{-9^{9^{9}}}"]
)
def test_numbers_that_no_machine_can_hold_are_given_up_at_once(text: str) -> None:
    assert not same_value(read_expression(text), read_expression("2"))
