"""Numbers of a text: whatever way they are written, the value is what counts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.data.numerals import number_lists, spoken_numbers, written_numbers

SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int, *, joined: str = " and ", hyphen: str = "-") -> str:
    """The English words for a number below a trillion."""
    for scale, word in ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if number >= scale:
            head, rest = divmod(number, scale)
            start = f"{in_words(head, joined=joined, hyphen=hyphen)} {word}"
            return start + (joined + in_words(rest, joined=joined, hyphen=hyphen) if rest else "")
    if number < 20:
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (hyphen + SMALL[ones] if ones else "")


@given(st.integers(0, 10**12 - 1), st.sampled_from([" ", " and "]), st.sampled_from([" ", "-"]), st.booleans())
def test_every_number_below_a_trillion_is_heard(number: int, joined: str, hyphen: str, capital: bool) -> None:
    text = in_words(number, joined=joined, hyphen=hyphen)
    assert spoken_numbers(f"There are {text.upper() if capital else text} of them.") == {Fraction(number)}


@given(st.lists(st.integers(0, 10**12 - 1), max_size=5))
def test_numbers_that_other_words_part_stay_apart(values: list[int]) -> None:
    assert spoken_numbers(", ".join(map(in_words, values))) == set(map(Fraction, values))


@given(st.integers(0, 10**30), st.integers(0, 10**6), st.sampled_from([",", "{,}", r",\!", r"\,", ""]))
def test_digits_are_read_with_any_separator_of_thousands(whole: int, part: int, separator: str) -> None:
    text = f"{whole:,}".replace(",", separator) + f".{part}"
    assert written_numbers(f"about ${text}$ of") == {Fraction(f"{whole}.{part}")}


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["frac", "dfrac", "tfrac", "cfrac", "binom"]))
def test_all_ways_to_write_a_fraction_in_tex_are_one(a: int, b: int, command: str) -> None:
    wanted = {Fraction(a), Fraction(b)}
    for arguments in (f"{a}{b}", f" {a} {b}", f"{a}{{{b}}}", f"{{{a}}}{b}", f"{{{a}}}{{{b}}}"):
        assert written_numbers(f"\\{command}{arguments}x") == wanted


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (r"2\times3 and \sqrt7", {2, 3, 7}),
        ("x_3, A1, 2x", {2}),
        ("1, ..., 10 or 1...10", {1, 10}),
        ("1,2345", {1, 2345}),
        ("No.5.", {5}),
        ("v1.2.3", set()),
        ("٣ and ４", {3, 4}),
        ("9" * 5000, {(10**5000 - 1)}),
    ],
)
def test_digits(text: str, values: set[int]) -> None:
    assert written_numbers(text) == set(map(Fraction, values))


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ("153,370,371,407", {153370371407: {153, 370, 371, 407}}),
        ("(3,100)", {3100: {3, 100}}),
        ("1,000 and 1,200.50 and 12 and 1{,}200", {}),
        ("1,2345", {}),
    ],
)
def test_numbers_that_may_be_lists(text: str, lists: dict[int, set[int]]) -> None:
    assert dict(number_lists(text)) == {Fraction(whole): set(map(Fraction, of)) for whole, of in lists.items()}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("two and three", {2, 3}),
        ("five hundred and two hundred", {500, 200}),
        ("a hundred, a thousand", {100, 1000}),
        ("tens of someone's often phoned tenths", set()),
        ("one hundredth", {1}),
        ("half of twice a triple", {Fraction(1, 2), 2, 3}),
    ],
)
def test_words(text: str, values: set[int | Fraction]) -> None:
    assert spoken_numbers(text) == set(map(Fraction, values))


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert all(value >= 0 for value in written_numbers(text) | spoken_numbers(text))
