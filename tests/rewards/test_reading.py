"""What kind of thing an answer is, decided before anything is compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.kinds import (
    Alternatives,
    Assignments,
    Choice,
    Clock,
    Equation,
    Foreign,
    Items,
    Matrix,
    Named,
    Numeral,
    Phrase,
    Ratio,
    Reading,
    Region,
    Scalar,
)
from megatron_coreward.rewards.latex import MAX_LENGTH
from megatron_coreward.rewards.reading import read


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (r"\frac{1}{2}", Scalar),
        ("2 1/4", Scalar),
        ("12 marbles", Scalar),
        ("1,000", Scalar),
        ("100,200", Alternatives),
        ("1010_2", Numeral),
        ("3:4:5", Ratio),
        ("2:30", Clock),
        (r"6\text{ p.m.}", Clock),
        ("1, 2", Items),
        ("(1, 2)", Items),
        (r"\{1, 2\}", Items),
        (r"1\pm\sqrt2", Items),
        (r"(0,1)\cup(2,3)", Region),
        ("0<x<1", Region),
        (r"\{x \mid x>2\}", Region),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", Matrix),
        ("x=4", Named),
        (r"\text{Area}=12", Named),
        ("2x=10", Equation),
        ("x=1, y=2", Assignments),
        ("(x,y)=(1,2)", Assignments),
        ("(B)", Choice),
        (r"\text{odd}", Phrase),
        (r"5\text{ at most}", Phrase),
        (r"\sum_{k=1}^{9} k", Foreign),
        ("", Phrase),
        ("1" * (MAX_LENGTH + 1), Phrase),
    ],
)
def test_kinds_are_told_apart_by_form(answer: str, kind: type[Reading]) -> None:
    assert isinstance(read(answer), kind), read(answer)


@given(st.text(max_size=60) | st.text(alphabet=r"\fracsqtex{}()[]^_$,./ 0123x=:|<>!'" + "\n", max_size=60))
def test_every_text_has_a_reading(text: str) -> None:
    assert isinstance(read(text), Reading)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit",
    [
        "(1,100),",
        "{",
        "1,",
        "100,",
        r"\text{a}",
        "x=",
        "|",
        r"\{1,100,",
        "1:",
        "x<",
        " or ",
        "_2",
        r"\pm ",
        "5 cm ",
        "a and ",
    ],
)
def test_the_longest_texts_are_read_in_little_time(unit: str) -> None:
    read(unit * (MAX_LENGTH // len(unit)))
    read("1" + unit * ((MAX_LENGTH - 2) // len(unit)) + "1")
