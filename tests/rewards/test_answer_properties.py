"""Generated answers whose values are known: equal values are the same, different ones differ, in any spelling."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_coreward.rewards.arithmetic import Full, Quick
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.reading import read
from megatron_coreward.rewards.sameness import Undecided, same

pytestmark = pytest.mark.timeout(300)

Valued = tuple[str, Fraction]
FULL = Full(lambda a, b: False)  # generated answers need no computer algebra system
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def equal(a: str, b: str) -> bool:
    verdict = same(read(a), read(b), FULL)
    assert same(read(b), read(a), FULL) is verdict
    with contextlib.suppress(Undecided):
        assert same(read(a), read(b), Quick()) is verdict
    return verdict


@st.composite
def leaves(draw: st.DrawFn) -> Valued:
    whole = draw(st.integers(0, 99))
    spelling = draw(st.sampled_from(["{}", "{}.0", "({})", "{{{}}}", r"\mathbf{{{}}}", "+{}"]))
    return spelling.format(whole), Fraction(whole)


def combined(children: st.SearchStrategy[Valued]) -> st.SearchStrategy[Valued]:
    def power(base: Valued, exponent: int) -> Valued:
        return rf"\left({base[0]}\right)^{{{exponent}}}", base[1] ** exponent

    def fraction(above: Valued, below: Valued) -> Valued:
        below = below if below[1] else (f"({below[0]})+1", below[1] + 1)
        return rf"\frac{{{above[0]}}}{{{below[0]}}}", above[1] / below[1]

    pairs = st.tuples(children, children)
    return st.one_of(
        pairs.map(lambda p: (f"({p[0][0]})+({p[1][0]})", p[0][1] + p[1][1])),
        pairs.map(lambda p: (f"({p[0][0]}) - ({p[1][0]})", p[0][1] - p[1][1])),
        pairs.map(lambda p: (rf"({p[0][0]}) \cdot ({p[1][0]})", p[0][1] * p[1][1])),
        pairs.map(lambda p: fraction(*p)),
        st.tuples(children, st.integers(1, 5)).map(lambda p: power(*p)),
        children.map(lambda c: (f"-({c[0]})", -c[1])),
        children.map(lambda c: (rf"\left|({c[0]})\right|", abs(c[1]))),
        children.map(lambda c: (rf"\sqrt{{({c[0]})^2}}", abs(c[1]))),
    )


expressions = st.recursive(leaves(), combined, max_leaves=6)


@SETTINGS
@given(expressions, expressions)
def test_rational_expressions_are_the_same_if_and_only_if_their_values_are(a: Valued, b: Valued) -> None:
    assert equal(a[0], b[0]) is (a[1] == b[1])
    value = str(a[1])
    assert equal(a[0], value)
    assert not equal(a[0], str(a[1] + Fraction(1, 10**40)))


@SETTINGS
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 400), st.integers(0, 2))
def test_powers_however_small_are_told_apart(base: int, other: int, exponent: int, step: int) -> None:
    a, b = rf"\frac{{1}}{{{base}^{{{exponent}}}}}", rf"{other}^{{-{exponent + step}}}"
    assert equal(a, b) is (base**exponent == other ** (exponent + step))
    assert equal(rf"\pi+{a}", rf"\pi+{b}") is (base**exponent == other ** (exponent + step))


@SETTINGS
@given(st.integers(1, 999), st.integers(1, 999), st.integers(1, 50), st.integers(1, 50))
def test_square_roots_are_told_apart_by_their_squares(a: int, b: int, m: int, n: int) -> None:
    assert equal(rf"{m}\sqrt{{{a}}}", rf"{n}\sqrt{{{b}}}") is (m * m * a == n * n * b)
    assert equal(rf"\sqrt{{{m * m * a}}}", rf"{m}\sqrt{{{a}}}")
    assert equal(rf"\frac{{{m}}}{{\sqrt{{{a}}}}}", rf"\frac{{{m}\sqrt{{{a}}}}}{{{a}}}")


@SETTINGS
@given(st.integers(-360, 360), st.integers(-360, 360))
def test_angles_in_degrees_follow_trigonometry(a: int, b: int) -> None:
    same_sine = (a - b) % 360 == 0 or (a + b - 180) % 360 == 0
    assert equal(rf"\sin({a}^\circ)", rf"\sin({b}^\circ)") is same_sine
    assert equal(rf"\cos({a}^\circ)", rf"\sin({90 - a}^\circ)")


@SETTINGS
@given(*[st.integers(-9, 9)] * 4)
def test_complex_numbers_are_told_apart_by_their_parts(a: int, b: int, c: int, d: int) -> None:
    product = complex(a, b) * complex(c, d)
    assert equal(f"({a}+{b}i)({c}+{d}i)", f"{int(product.real)}+{int(product.imag)}i".replace("+-", "-"))
    assert equal(f"{a}+{b}i", f"{c}+{d}i") is ((a, b) == (c, d))


@SETTINGS
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5), st.randoms())
def test_sets_and_lists_have_no_order_and_tuples_do(values: list[int], rng: object) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    plain, mixed = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
    assert equal(plain, mixed)
    assert equal(rf"\{{{plain}\}}", mixed)
    assert equal(f"({plain})", f"({mixed})") is (values == shuffled)
    assert equal(f"({plain})", mixed) is (values == shuffled)
    assert not equal(f"({plain})", rf"\{{{mixed}\}}")
    assert not equal(plain, f"{plain}, 1000")


@SETTINGS
@given(*[st.integers(1, 40)] * 4)
def test_ratios_are_proportions_and_times_are_not(a: int, b: int, k: int, c: int) -> None:
    assert equal(f"{a}:{b}:{c}", f"{k * a}:{k * b}:{k * c}")
    assert equal(f"{a}:{b}:{c}", f"{b}:{a}:{c}") is (a == b)
    hour, minute = a % 12 + 1, b % 60
    assert equal(f"{hour}:{minute:02}", f"{c % 12 + 1}:{k % 60:02}") is ((hour, minute) == (c % 12 + 1, k % 60))
    assert not equal(rf"{hour}:{minute:02}\text{{ am}}", rf"{hour}:{minute:02}\text{{ p.m.}}")


@pytest.mark.long
@SETTINGS
@given(*[st.integers(-9, 9)] * 3, st.integers(1, 9), st.integers(1, 9))
def test_lines_are_the_same_in_every_form(a: int, c: int, d: int, b: int, k: int) -> None:
    general = f"{a}x+{b}y={c}".replace("+-", "-")
    explicit = rf"y=\frac{{{-a}x+{c}}}{{{b}}}".replace("+-", "-")
    scaled = f"{-k * a}x-{k * b}y+{k * c}=0".replace("+-", "-")
    other = f"{a}x+{b}y={d}".replace("+-", "-")
    assert equal(general, explicit)
    assert equal(general, scaled)
    assert equal(explicit, scaled)
    assert equal(other, explicit) is (c == d)


@pytest.mark.long
@SETTINGS
@given(*[st.integers(1, 30)] * 2)
def test_equations_without_real_solutions_are_told_apart(a: int, b: int) -> None:
    assert equal(f"x^2+{a}=0", f"x^2+{b}=0") is (a == b)
    assert equal(f"|x|=-{a}", f"|x|=-{b}") is (a == b)
    assert equal(rf"\gcd(m,n)={a}", rf"\gcd(m,n)={b}") is (a == b)
    assert equal(f"x^2+{a}=0", f"2x^2+{2 * a}=0")


@SETTINGS
@given(st.text("0123456789", min_size=1, max_size=4), st.text("0123456789", min_size=1, max_size=5))
def test_repeating_decimals_are_fractions(fixed: str, period: str) -> None:
    value = Fraction(int(fixed), 10 ** len(fixed)) + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    assert equal(rf"0.{fixed}\overline{{{period}}}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}")
    assert equal(rf"0.{fixed}\overline{{{period}}}", f"0.{fixed}{period}") is (int(period) == 0)


@SETTINGS
@given(st.integers(2, 999), st.sampled_from("abcdfhjklnpqrtuvwxyz"), st.sampled_from("abcdfhjklnpqrtuvwxyz"))
def test_a_letter_behind_a_number_is_a_factor(value: int, first: str, second: str) -> None:
    for spelling in ("{}{}", r"{}\mathrm{{{}}}", r"{}\mathbf{{{}}}", "{} {}"):
        answer = spelling.format(value, first)
        assert not equal(answer, str(value))
        assert equal(answer, spelling.format(value, second)) is (first == second)


@SETTINGS
@given(
    st.integers(2, 999),
    st.sampled_from(
        ["{} marbles", r"{}\text{{ cm}}", "{} m/s", "{}^\\circ C", "{} USD", r"{}\text{{ red balls}}", "{}\\%"]
    ),
)
def test_units_and_plain_nouns_are_fixed_by_the_question(value: int, spelling: str) -> None:
    assert equal(spelling.format(value), str(value))
    assert not equal(spelling.format(value), str(value + 1))


CHANGING = ["at most", "less", "north", "below zero", "halves", "tenths", "k", "M", "B", "p.m", "or more", "left", "BC"]


@SETTINGS
@given(st.integers(2, 999), st.sampled_from(CHANGING))
def test_words_that_change_a_value_are_no_units(value: int, words: str) -> None:
    assert not equal(rf"{value}\text{{ {words}}}", str(value))


@pytest.fixture(scope="module")
def shared() -> Iterator[AnswerEquivalence]:
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        yield equivalence


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(a=expressions, b=expressions)
def test_a_verdict_does_not_depend_on_what_was_asked_before(shared: AnswerEquivalence, a: Valued, b: Valued) -> None:
    with AnswerEquivalence("math", timeout_s=60.0, num_workers=1) as fresh:
        assert fresh.equivalent(a[0], b[0]) is shared.equivalent(a[0], b[0]) is (a[1] == b[1])
