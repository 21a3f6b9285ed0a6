"""Rewritings: replies are read strictly, and the checks find what changed."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.data.rephrasing import check, numbers, parse_reply, rewriting_prompt, similarity
from megatron_coreward.data.rewriting_prompts import PROMPTS

QUESTION = (
    "Seven identical bowling balls weigh as much as four canoes. If three canoes weigh 84 pounds, how heavy is a ball?"
)
GOOD = "One dock holds four boats that balance seven stones. Three of the boats are 84 pounds. What does a stone weigh?"


@pytest.mark.parametrize(
    ("reply", "text", "why"),
    [
        ("<rewritten>New words?</rewritten>", "New words?", ""),
        ("<think>hm <rewritten>no</rewritten></think>\n<rewritten> New?\n</rewritten>\n", "New?", ""),
        ("New words?", None, "0 opening and 0 closing tags"),
        ("Sure! <rewritten>New?</rewritten>", None, "text outside of the tags"),
        ("<rewritten>a</rewritten><rewritten>b</rewritten>", None, "2 opening and 2 closing tags"),
        ("<rewritten> </rewritten>", None, "an empty rewriting"),
        ("<think>never closed", None, "the thinking was never closed"),
        ("the template opened it <rewritten>no</rewritten></think>\n<rewritten>New?</rewritten>", "New?", ""),
        ("<think>a</think>b<think>c", None, "the thinking was never closed"),
    ],
)
def test_a_reply_is_one_block_and_nothing_else(reply: str, text: str | None, why: str) -> None:
    assert parse_reply(reply) == (text, why)


@given(st.text())
def test_whatever_is_in_the_block_comes_out(text: str) -> None:
    found, why = parse_reply(f"<rewritten>{text}</rewritten>")
    if "rewritten>" not in text and "<think>" not in text and "</think>" not in text:
        assert (found, why) == ((text.strip(), "") if text.strip() else (None, "an empty rewriting"))


@given(st.sampled_from(["", "<rewritten>", "<think>x</think>"]), st.text(), st.sampled_from(["", "</rewritten>"]))
def test_no_reply_raises(head: str, text: str, tail: str) -> None:
    found, why = parse_reply(head + text + tail)
    assert (found is None) == bool(why)
    if found is not None:
        check("How many of the 12 are left?", found)


def test_a_number_that_changed_behind_a_command_of_tex_is_seen() -> None:
    original = r"A recipe takes $\frac59$ of a cup of sugar for $2\times7$ small cakes. How much is that a cake?"
    text = r"For $2\times7$ lamps a painter uses $\frac{5}{9}$ of a tin. Which share of the tin goes into one lamp?"
    assert check(original, text).passed
    assert check(original, text.replace("{5}", "{7}")).failures == ["numbers"]
    assert check(original, text.replace("7$", "8$")).failures == ["numbers", "new_numbers"]


def test_words_in_formulas_are_no_numbers() -> None:
    assert numbers(r"$\text{ten}$ and nine") == {Fraction(9)}


def test_numbers_are_read_in_digits_and_words() -> None:
    assert numbers("In 1,200 boxes of 2.50 there are seventy; $x_3 + .5$ is half.") == {
        Fraction(1200),
        Fraction(5, 2),
        Fraction(70),
        Fraction(1, 2),
    }
    assert numbers("[asy] draw((0,0)--(9,9)); [/asy] 8") == {Fraction(8)}


def test_a_rewriting_that_keeps_the_mathematics_passes() -> None:
    assert check(QUESTION, GOOD).passed


@pytest.mark.parametrize(
    ("rewriting", "failures"),
    [
        (QUESTION, ["not_a_copy"]),
        (
            "Five identical dumbbells weigh the same as three kayaks. Two kayaks are 56 pounds: and one dumbbell?",
            ["numbers", "new_numbers"],
        ),
        (GOOD + " The answer is in pounds.", ["no_answer"]),
        (GOOD + " The final answer is 84.", ["no_answer"]),
        (GOOD + " It is $x.", ["formulas"]),
        ("84 7 4?", ["length"]),
    ],
)
def test_each_check_sees_its_fault(rewriting: str, failures: list[str]) -> None:
    assert check(QUESTION, rewriting).failures == failures


@pytest.mark.parametrize(
    "form", ["in the form $a/b$", "of the form $a$", "expressed in the simplest form", "to be given in its lowest form"]
)
def test_the_form_of_an_answer_gives_nothing_away(form: str) -> None:
    assert check(QUESTION, f"{GOOD} The answer is {form}; find it.").passed
    for given_away in ("three, ", "three ", "7 "):
        assert check(QUESTION, f"{GOOD} The answer is {given_away}{form}.").failures[-1] == "no_answer"


def test_numbers_in_a_list_without_spaces_are_not_one_number() -> None:
    old = "Which of the numbers 153,370,371,407 are equal to the sum of the cubes of all of their own digits?"
    new = "A clerk adds up digits to the third power. For 371, 153, 407 and 370: where does he get the number itself?"
    assert check(old, new).passed
    assert check(new, old).passed
    assert check(old, new.replace("407", "408")).failures == ["numbers", "new_numbers"]
    assert check(old, new.replace("407", "a few")).failures == ["numbers"]
    large = "A city of 1,250,000 people grows by 4% a year. How many people live there when two years are over?"
    text = "Each year 4% are added to a herd that counts 1,250,000 heads today. Tell its size after the second year."
    assert check(large, text).passed
    assert check(large, text.replace("1,250,000", "250,000")).failures == ["numbers", "new_numbers"]


PAPER_REPLY = "### RESULT_START\nORIGINAL:\nOld?\nREWRITE:\nNew words?\n### RESULT_END"


@pytest.mark.parametrize(
    ("reply", "text", "why"),
    [
        (PAPER_REPLY, "New words?", ""),
        (f"Sure!\n{PAPER_REPLY}\nHope that helps.", "New words?", ""),
        (f"<think>hm</think>{PAPER_REPLY}", "New words?", ""),
        (PAPER_REPLY.replace("New words?", "a REWRITE: b"), "a REWRITE: b", ""),
        (PAPER_REPLY.replace("New words?", " "), None, "an empty rewriting"),
        (PAPER_REPLY.replace("REWRITE:", ""), None, "no REWRITE: between the markers"),
        (PAPER_REPLY.removesuffix("### RESULT_END"), None, "no result between the markers"),
        ("<think>never closed", None, "the thinking was never closed"),
    ],
)
def test_replies_to_the_papers_prompt(reply: str, text: str | None, why: str) -> None:
    assert parse_reply(reply, "paper") == (text, why)


def test_the_papers_prompt_comes_with_its_sampling() -> None:
    prompt = PROMPTS["paper"]
    assert (prompt.temperature, prompt.top_p, prompt.thinking) == (0.7, 0.8, False)
    (message,) = rewriting_prompt(QUESTION, "paper")
    assert message["content"].startswith("You are given a math problem.")
    assert message["content"].endswith(f"### RESULT_END\n\n{QUESTION}")
    assert prompt.hash != PROMPTS["own"].hash


@given(st.text(min_size=1), st.text(min_size=1))
def test_similarity_is_symmetric_and_a_copy_is_the_most_similar(one: str, other: str) -> None:
    assert similarity(one, one) == 1.0
    assert similarity(one, other) == similarity(other, one)
    assert 0.0 <= similarity(one, other) <= 1.0


def test_the_question_stands_in_the_prompt() -> None:
    (message,) = rewriting_prompt(QUESTION)
    assert message["role"] == "user"
    assert message["content"].endswith(QUESTION)
