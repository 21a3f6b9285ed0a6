"""The last box is the answer, whatever surrounds it and however large the text is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.answer import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed {42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{a \boxed{b} c}", "b"),  # the last to open
        (r"\boxed{\left\{ x : x > 1 \right.}", r"\left\{ x : x > 1 \right."),  # an escaped brace is no brace
        (r"\boxed{1 \\}", r"1 \\"),  # an escaped backslash escapes nothing
        (r"\boxed{line" + "\n" + "break}", "line\nbreak"),
        (r"$\boxed 5$ apples", "5"),
        (r"\boxed 5" + "\nthat is all", "5"),
        (r"\boxed{7}, where \boxed means final", "7"),
        (r"\fbox{3}", "3"),
        (r"\fbox{3} and \boxed{4} and \fbox{5}", "4"),
        (r"}} \boxed{6}", "6"),
        ("\\boxed{\x00}", "\x00"),
    ],
)
def test_answer_is_the_content_of_the_last_balanced_box(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["", "42", r"\boxed", r"\boxed{", r"\boxed{42", r"\boxed{\{42\}", r"\boxed{}", r"\boxed{ }", r"\boxedup{4}"]
)
def test_no_box_an_open_box_and_an_empty_box_hold_no_answer(text: str) -> None:
    assert extract_answer(text) is None


def test_a_box_that_was_cut_off_is_passed_over() -> None:
    assert extract_answer(r"It is \boxed{12}. To be sure: \boxed{1") == "12"


def test_an_empty_last_box_is_no_answer_even_after_a_full_one() -> None:
    assert extract_answer(r"\boxed{12} \boxed{}") is None


@given(st.text(alphabet=r"\boxedf{} $5" + "\n", max_size=60))
def test_any_text_gives_a_stripped_part_of_it_or_nothing(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and answer in text)


@given(st.text(max_size=40), st.text(alphabet="ab12{}", max_size=20))
def test_what_is_boxed_last_comes_back(before: str, content: str) -> None:
    depth, balanced = 0, True
    for char in content:
        depth += {"{": 1, "}": -1}.get(char, 0)
        balanced &= depth >= 0
    boxed = before.rstrip("\\") + r"\boxed{" + content + "}"
    if balanced and depth == 0:
        assert extract_answer(boxed) == (content or None)


@pytest.mark.parametrize(
    "unit",
    [
        r"\boxed{",
        "{",
        "}",
        "{}",
        r"\boxed{}",
        r"\boxed{1}",
        r"\boxed ",
        r"\boxed" + " " * 1000,
        "\\",
        "\x00",
        r"\fbox{",
    ],
)
def test_hostile_megabytes_take_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.monotonic()
    extract_answer(text)
    assert time.monotonic() - start < 5.0
