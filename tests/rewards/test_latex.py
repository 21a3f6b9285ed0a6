"""Spellings of one value share one normal form, and different values do not."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.latex import MAX_EXPONENT, MAX_LENGTH, as_number, canonical

SAME = [
    [r"\dfrac12", r"\tfrac{1}{2}", r"\frac 1 2", r"\frac1{2}", r"\frac{1}2", "1/2", "0.5", ".50", "x = 0.5", "$0.5$."],
    [r"-\frac{3}{4}", r"\frac{-3}{4}", "-3/4", "-0.75", "−0.75", r"\(-0.75\)"],
    [
        "1000",
        "1,000",
        r"1{,}000",
        r"1,\!000",
        r"1\,000",
        "1 000",
        "1000.00",
        r"10^3",
        r"10^{3}",
        "1e3",
        r"1 \times 10^3",
    ],
    ["1000000", "1,000,000", r"1,\!000,\!000", r"1,\! 000,\! 000"],
    ["90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees", r"90\text{ degrees}", "+90", "{90}"],
    ["50", r"50\%", "50%", "50 percent", r"50 \text{ percent}"],
    [
        "5",
        r"5\text{ cm}",
        r"5\,\text{cm}^2",
        r"5 \mathrm{~cm}^{2}",
        "5 square feet",
        r"\$5",
        r"5 \mbox{ inches}^2",
        "5 km.",
    ],
    ["C", "(C)", r"\text{C}", r"\text{(C)}", r"(\text{C})", r"\textbf{(C)}"],
    ["Even", "even", r"\text{even}", r"\text{ Even }", r"\mathrm{even}"],
    ["No", r"\text{no}"],
    ["(1,2)", r"\left(1, 2\right)", r"\left( 1.0,\frac{4}{2} \right)", r"\bigl(1,2\bigr)", "P = (1, 2)"],
    ["1, 2", "2,1", r"\{1, 2\}", r"\left\{ 2, 1 \right\}", r"1 \text{ and } 2", "1 or 2", "x = 1, 2"],
    ["7,-2,-5", r"7, -2, \text{ and } -5"],
    [r"\sqrt2", r"\sqrt{2}", r"\sqrt 2", r"\sqrt{2}\text{ units}"],
    [r"\frac{\pi}{2}", r"\frac\pi2", r"\dfrac{\pi}{2}", "\\frac{π}{2}"],
    [r"x^2+1", r"x^{2} + 1", r"f(x) = x^2 + 1", r"y=x^2+1.0"],
    [r"11\frac{2}{3}", "35/3", "11 2/3", r"11 \frac{2}{3}"],
    [r"[0,\infty)", r"x \in [0, \infty)", r"\left[0,\infty\right)"],
    [r"\pi r^2", r"\pi  r^{2}"],
    [r"\begin{pmatrix} a \\ b \end{pmatrix}", r"\begin{pmatrix}a\\ b\end{pmatrix}"],
]


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_value_share_a_form(spellings: list[str]) -> None:
    forms = {spelling: canonical(spelling) for spelling in spellings}
    assert len(set(forms.values())) == 1, forms


def test_different_values_have_different_forms() -> None:
    forms = [canonical(spellings[0]) for spellings in SAME]
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1,000", "1, 000"),  # a number, a list
        ("12", "1 2"),
        ("1 1/2", "11/2"),
        ("0.333", "1/3"),  # numbers are exact
        ("(1,2)", "(2,1)"),
        (r"9\text{ a.m.}", r"9\text{ p.m.}"),
        (r"\pi r", r"\pir"),
        ("x^{23}", "x^{2}3"),
        (r"2\frac{1}{3}", "2/3"),
        ("A", "B"),
        ("ab", "ba"),
    ],
)
def test_what_looks_alike_and_differs_is_kept_apart(a: str, b: str) -> None:
    assert canonical(a) != canonical(b)


@pytest.mark.parametrize(
    ("a", "b", "open_question"),
    [
        ("1", "2", False),
        ("1", "1,2", False),
        ("(1,2)", "(1,3)", False),
        ("(1,2)", "1", False),
        (r"\text{even}", "2", False),
        (r"\text{even}", r"\sqrt{2}", False),
        ("A", "B", False),
        (r"\sqrt{4}", "2", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("(1,2)", "1,2", True),
        ("(1,2,3)", "[1,2,3]", True),
        (r"(1,\pi)", "(1,3)", True),
        (r"(1,\pi)", "3", False),
        (r"2\sqrt{2}", "(1,3)", False),
        (r"2\sqrt{2}", r"1,\pi", False),
        (r"2\sqrt{2}", r"(0,\infty)\cup(2,3)", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\sqrt{2}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", True),
        (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}", True),
        ("[0,5]", r"0\le x\le5", True),
        (r"(-\infty,\infty)", r"\mathbb{R}", True),
        (r"\{\pi\}", r"\pi", True),
        (r"f(1,2)", r"(1+x)f(2,3)", True),
    ],
)
def test_forms_alone_settle_what_needs_no_algebra(a: str, b: str, open_question: bool) -> None:
    assert canonical(a).may_equal(canonical(b)) is open_question
    assert canonical(b).may_equal(canonical(a)) is open_question


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-12", Fraction(-12)),
        ("2.50", Fraction(5, 2)),
        (".5", Fraction(1, 2)),
        ("1.5e-3", Fraction(3, 2000)),
        (r"1.5\times10^{3}", Fraction(1500)),
        (r"\frac{-1.5}{3}", Fraction(-1, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        ("2^{-2}", Fraction(1, 4)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("0^{0}", None),
        ("0^{-1}", None),
        (f"1e{MAX_EXPONENT + 1}", None),
        ("1e99999999999", None),
        (f"10^{{{MAX_EXPONENT}}}", None),  # 1001 digits
        ("9999999999^{9999}", None),
        ("1.2.3", None),
        ("٣", None),  # digits of other scripts
        ("x", None),
        ("", None),
    ],
)
def test_plain_numbers_are_read_exactly_and_within_bounds(text: str, value: Fraction | None) -> None:
    assert as_number(text) == value


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_is_read_back_from_its_spellings(value: Fraction) -> None:
    above, below = value.numerator, value.denominator
    for spelling in (f"{above}/{below}", rf"\dfrac{{{above}}}{{{below}}}", rf"$x=\frac{{{above}}}{{{below}}}$."):
        assert canonical(spelling) == canonical(str(value))


@given(st.integers(min_value=-(10**15), max_value=10**15))
def test_thousands_separators_change_nothing(value: int) -> None:
    assert canonical(f"{value:,}") == canonical(str(value)) == canonical(f"{value:,}".replace(",", r",\!"))


@given(st.text(max_size=80) | st.text(alphabet=r"\fracsqtex{}()[]^_$,./ 0123x=" + "\n", max_size=80))
def test_any_text_has_a_form(text: str) -> None:
    assert canonical(text) == canonical(f" {text} ") or not text.strip()


def test_longer_texts_are_not_looked_into() -> None:
    assert canonical("1" * (MAX_LENGTH + 1)).kind == "opaque"
    assert canonical("1" * MAX_LENGTH).kind == "number"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit", ["{", r"\frac", r"\frac{", r"\text{", "0", "0.", ",", " ", "^", "(", "-", r"\\", "a_", r"\text{a}"]
)
def test_the_longest_texts_that_are_looked_into_cost_little(unit: str) -> None:
    canonical(unit * (MAX_LENGTH // len(unit)))
    canonical("1" + unit * ((MAX_LENGTH - 2) // len(unit)) + "1")
