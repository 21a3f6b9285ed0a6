"""Answers by the rules of the MATH benchmark: what they make the same, what they leave apart, what they cannot read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.hendrycks import comparable, normal_form
from megatron_coreward.rewards.voting import majority_vote

SAME = [
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\tfrac{1}{2}", "1/2"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.5"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    ("-3/4", r"\frac{-3}{4}"),
    ("(1, 2)", "(1,2)"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"10\text{ cm}", "10"),
    (r"12\text{ square inches}", "12"),
    (r"50\%", "50"),
    (r"\$18.90", "18.90"),
    ("x = 5", "5"),
    ("k=-2", "-2"),
    (r"\sqrt3", r"\sqrt{3}"),
    (r"2\sqrt5+1", r"2\sqrt{5} + 1"),
    (r"10,\!000", "10,000"),
    (r"\{.5\}", r"\{0.5\}"),
    ("a\nb", "ab"),
]
APART = [
    ("0.25", r"\frac{1}{4}"),  # of decimals, one half alone
    ("1,000", "1000"),
    (r"\text{even}", "even"),
    ("(1,2)", "(2,1)"),
    ("abc=5", "5"),  # a longer name is part of the answer
    ("x=1=y", "1=y"),
    ("01/2", r"\frac{1}{2}"),
    ("1/2/3", r"\frac{1}{2}/3"),
    ("", " "),  # no answers
]
UNREADABLE = [r"5\text{ m}\text{ s}", r"\sqrt", r"2\sqrt\sqrt3", r"\frac", r"\frac12\frac"]


@pytest.fixture(scope="module")
def hendrycks() -> AnswerEquivalence:
    return AnswerEquivalence("hendrycks")


@pytest.mark.parametrize(("a", "b"), SAME)
def test_spellings_of_one_answer(a: str, b: str, hendrycks: AnswerEquivalence) -> None:
    assert hendrycks.equivalent(a, b)
    assert hendrycks.equivalent(b, a)
    assert not AnswerEquivalence("exact").equivalent(a, b)


@pytest.mark.parametrize(("a", "b"), APART)
def test_what_the_rules_leave_apart(a: str, b: str, hendrycks: AnswerEquivalence) -> None:
    assert not hendrycks.equivalent(a, b)


@pytest.mark.parametrize("answer", UNREADABLE)
def test_what_the_rules_cannot_read_is_its_own_spelling(answer: str, hendrycks: AnswerEquivalence) -> None:
    assert normal_form(answer) is None
    assert hendrycks.equivalent(answer, answer)
    assert not hendrycks.equivalent(answer, f" {answer}")


def test_a_fraction_of_one_character_is_left_with_the_whole_text() -> None:
    assert normal_form(r"\frac1") == r"\frac1"
    assert normal_form(r"\frac12+\frac1") == r"\frac12+\frac1"


def test_missing_answers_are_the_same_as_nothing(hendrycks: AnswerEquivalence) -> None:
    assert not hendrycks.equivalent(None, None)
    assert not hendrycks.equivalent("1", None)


def test_a_vote_counts_spellings_together(hendrycks: AnswerEquivalence) -> None:
    answers = ["3", r"\dfrac12", "3", "0.5", "1/2"]
    assert majority_vote(answers, hendrycks).label == r"\dfrac12"
    assert majority_vote(answers, AnswerEquivalence("exact")).label == "3"


@given(st.text(alphabet=r"\sqrtfacdtex{}12./=$%^ -" + "\n", max_size=40))
def test_no_text_raises_and_no_normal_form_has_spaces_or_line_breaks(text: str) -> None:
    form = normal_form(text)
    assert form is None or not set(form) & {" ", "\n"}
    assert (comparable(text) == form) == (form is not None)
