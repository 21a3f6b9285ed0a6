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


@pytest.mark.parametrize("empty", [r"\boxed{}", r"\boxed{ }", r"\boxed{\boxed{}}", r"\fbox{}", r"\boxed", r"\boxed{"])
def test_an_empty_later_box_quotes_the_instructions_and_erases_no_answer(empty: str) -> None:
    assert extract_answer(rf"It is \boxed{{12}}. I put it within {empty} as asked.") == "12"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1\nno:\n#### 1,234 \nthanks", "1,234"),
        ("#### $x+1$.", "x+1"),
        ("####", None),
        ("#### \n7", None),
        ("7", None),
    ],
)
def test_hashes_announce_the_rest_of_their_line(text: str, answer: str | None) -> None:
    assert extract_answer(text, ("hashes",)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 42.", "42"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
        ("Answer: 3.5", "3.5"),
        ("**Answer:** 12", "12"),
        ("answer = \\(x^2\\)", "x^2"),
        ("The answer is 1. Wait, the answer is 2", "2"),
        ("We add and get\n\n 42 ", "42"),
        ("We add and get\n$$x+1$$", "x+1"),
        ("We add and get 42", None),
        ("The answer is", None),
        ("answers: 42", None),
        ("", None),
    ],
)
def test_plain_answers_are_announced_or_stand_alone_in_the_last_line(text: str, answer: str | None) -> None:
    assert extract_answer(text, ("plain",)) == answer


def test_forms_are_tried_in_order_and_only_those_asked_for() -> None:
    text = r"the answer is 1, \boxed{2}" + "\n#### 3"
    assert extract_answer(text) == "2"
    assert extract_answer(text, ("hashes", "boxed")) == "3"
    assert extract_answer("#### 3", ("boxed", "hashes", "plain")) == "3"
    assert extract_answer("#### 3") is None
    with pytest.raises(ValueError, match="allowed: boxed, hashes, plain"):
        extract_answer(text, ("latex",))  # type: ignore[arg-type]


@given(st.text(alphabet=r"\boxedf{} $5" + "\n", max_size=60))
def test_any_text_gives_a_stripped_part_of_it_or_nothing(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or (answer and answer == answer.strip() and answer in text)


@given(st.lists(st.sampled_from([r"\boxed", r"\fbox", "box", "f", "\\", "{", "}", "5", " ", "$", "\n"]), max_size=14))
def test_what_stands_before_the_first_box_need_not_be_read(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert extract_answer(text) == extract_answer("box " + text)  # where "box" stands first, all of it is read


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
        "####",
        "answer ",
        "answer is" + " " * 1000,
        "answer: $",
        ". ",
        "$",
        "1,",
        "\n",
    ],
)
def test_hostile_megabytes_take_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.monotonic()
    for form in ("boxed", "hashes", "plain"):
        extract_answer(text, (form,))
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}" + "\n\n" + r"Question: what is 2+2? \boxed{4}", "5"),
        (r"Question: x? \boxed{5} Question: y? \boxed{6}", "5"),  # the first has no answer before it
        (r"\boxed{5} Problem: \boxed{6}", "6"),
        (r"no answer. Question: \boxed{3}", "3"),
        ("", None),
    ],
)
def test_a_follow_up_that_nobody_asked_for_is_not_read(text: str, answer: str | None) -> None:
    assert extract_answer(text, stop_at=("Question:",)) == answer
    assert extract_answer(text, stop_at=("", "Human:", "Question:")) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is yes. Let me know if the answer is clear.", "yes"),
        ("The answer is 12. I hope this answer is correct.", "12"),
        ("## Final Answer\n\n42", "42"),
        ("The answer is 5, since 2+3=5.", "5"),
        ("The answer to the question is 7.", "7"),
        ("答案为 $x=3$。", "x=3"),
        ("The answer is 3, 4, and 5.", "3, 4, and 5"),
        ("The answer is 6 p.m. sharp", "6 p.m."),
    ],
)
def test_plain_answers_end_where_the_sentence_goes_on(text: str, answer: str) -> None:
    assert extract_answer(text, ("plain",)) == answer


def test_doubled_backslashes_are_those_of_an_escaped_text() -> None:
    assert extract_answer(r"\\boxed{\\frac{1}{2}}") == r"\frac{1}{2}"
    assert extract_answer(r"x = 1 \\\boxed{1 \\ 2}") == r"1 \\ 2"  # a line break before a box
