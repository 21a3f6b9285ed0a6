"""The table of spelling rules: each says why, takes spellings of one text to one, and leaves what an answer says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.latex import MAX_LENGTH, RULES, clean

SAME = [
    [
        r"\frac{1}{2}",
        r"\dfrac{1}{2}",
        r"\tfrac{1}{2}",
        r"\cfrac{1}{2}",
        r"{1 \over 2}",
        r"$\frac{1}{2}$.",
        r"\(\frac{1}{2}\)",
    ],
    ["1000", r"1{,}000", r"1,\!000", r"1\,000", r"1\text{,}000"],
    ["(1,2)", r"\left(1,2\right)", r"\bigl(1,2\bigr)", "（1，2）"],
    [r"\{1,2\}", r"\lbrace 1,2\rbrace", r"\left\{1,2\right\}"],
    [r"\emptyset", r"\varnothing", "∅", r"\{\}", r"\left\{ \right\}"],
    ["5", r"\boldsymbol{5}", r"\textcolor{red}{5}", r"\color{red}5", r"\mathbf{5}", r"\text{5}", "{5}", r"5\,", "５"],
    [r"\binom{10}{3}", r"{10 \choose 3}", r"\dbinom{10}{3}"],
    [r"x\le 2", r"x\leq 2", r"x\leqslant 2"],
    [r"90^\circ", r"90^{\circ}", "90°", r"90\degree"],
    ["f'(x)", r"f^\prime(x)", r"f^{\prime}(x)", "f′(x)"],
    ["50%", r"50\%", r"50\text{\%}"],
    [r"\text{cm}", r"\mathrm{cm}", r"\textbf{cm}", r"\operatorname{cm}", r"\mbox{ cm}"],
    ["|x|", r"\lvert x\rvert", r"\left|x\right|"],
]


def spelled(text: str) -> str:
    return clean(text).replace(" ", "").replace("{", "").replace("}", "")


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_text_become_one(spellings: list[str]) -> None:
    assert len({spelled(spelling) for spelling in spellings}) == 1, [clean(spelling) for spelling in spellings]


def test_texts_that_say_different_things_stay_different() -> None:
    cleaned = [spelled(spellings[0]) for spellings in SAME]
    assert len(set(cleaned)) == len(cleaned)


def test_every_rule_has_its_reason() -> None:
    assert all(rule.reason and "\n" not in rule.reason for rule in RULES)


@given(st.text(max_size=80) | st.text(alphabet=r"\fracsqtex{}()[]^_$,./ 0123x=" + "\n", max_size=80))
def test_any_text_is_cleaned_whatever_surrounds_it(text: str) -> None:
    assert clean(text) == clean(f" {text} ") or not text.strip()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit",
    ["{", r"\frac", r"\frac{", r"\text{", "0", "0.", ",", " ", "^", "(", "-", r"\\", "a_", r"\text{a}", r"{\over"],
)
def test_the_longest_texts_that_are_looked_into_cost_little(unit: str) -> None:
    clean(unit * (MAX_LENGTH // len(unit)))
    clean("1" + unit * ((MAX_LENGTH - 2) // len(unit)) + "1")
