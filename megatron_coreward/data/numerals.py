r"""The numbers that a text names, by value: in digits, as plain text and TeX write them, and in English words.

Not read: signs, digits that belong to a name (`x_3`, `A1`), ordinals. "(3,100)" without a space reads as one number,
which `number_lists` gives as two.
Every function takes any text, and numbers of any length.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

_TEX_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3}(?!\d))")
_TEX_PAIR = re.compile(r"\\[dtc]?(?:frac|binom)\s*(\d)\s*(\d)")  # TeX takes one digit each: \frac12 is 1/2
_TEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_DIGITS = re.compile(r"(?<!\w)(?<!\d\.)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")

NumberLists = Mapping[Fraction, frozenset[Fraction]]

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES: Mapping[str, int] = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_ADDENDS: Mapping[str, int] = {
    "zero": 0,
    **{word: value for value, word in enumerate((*_ONES, *_TEENS), 1)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
}
_FACTORS: Mapping[str, Fraction] = {
    "half": Fraction(1, 2),
    "twice": Fraction(2),
    "double": Fraction(2),
    "triple": Fraction(3),
}


def _grammar() -> re.Pattern[str]:
    """One whole number in words, as long as it goes: "two thousand and five", "twenty-one", "a hundred"."""
    ones, teens, tens = ("|".join(words) for words in (_ONES, _TEENS, _TENS))
    gap, join = r"[\s-]+", r"(?:\s+and\s+|[\s-]+)"
    below_100 = rf"(?:(?:{tens})(?:{gap}(?:{ones})\b)?|{teens}|{ones})\b"
    number = rf"(?:(?:{below_100}{gap})?hundred\b(?:{join}{below_100}(?!{gap}hundred\b))?|{below_100})"
    below_1000 = number
    for scale in _SCALES:  # the smallest first: each may be followed by what is below it
        number = rf"(?:(?:{below_1000}{gap})?{scale}\b(?:{join}{number})?|{number})"
    return re.compile(rf"\b(?:zero\b|{number})")


_SPOKEN = _grammar()
_WORD = re.compile(r"[a-z]+")
_FACTOR = re.compile(rf"\b(?:{'|'.join(_FACTORS)})\b")


def written_numbers(text: str) -> set[Fraction]:
    """The numbers in digits: `1,200`, `2.50`, `.5`, `1{,}000`, `\\frac59` (5 and 9)."""
    plain = _TEX_COMMAND.sub(" ", _TEX_PAIR.sub(r" \1 \2 ", _TEX_THOUSANDS.sub(",", text)))
    # By way of Decimal, which reads longer numbers than int does (4,300 digits).
    return {Fraction(Decimal(match[0].replace(",", ""))) for match in _DIGITS.finditer(plain)}


def number_lists(text: str) -> NumberLists:
    """The numbers with commas that may be lists of numbers without a space instead, each with the members of that list.

    `153,370,371,407` and `3,100` may be; `1,000`, `1{,}200` and `1,200.50` may not.
    """
    lists = {}
    for match in _DIGITS.finditer(_TEX_COMMAND.sub(" ", text)):
        members = match[0].split(",")
        if len(members) > 1 and "." not in match[0] and not any(len(m) > 1 and m[0] == "0" for m in members):
            lists[Fraction(Decimal("".join(members)))] = frozenset(Fraction(Decimal(member)) for member in members)
    return lists


def spoken_numbers(text: str) -> set[Fraction]:
    """The numbers in English words, zero to billions, and half, twice, double, triple."""
    lower = text.lower()
    whole = {Fraction(_whole(match[0])) for match in _SPOKEN.finditer(lower)}
    return whole | {_FACTORS[match[0]] for match in _FACTOR.finditer(lower)}


def _whole(phrase: str) -> int:
    """What a phrase of the grammar says."""
    finished, below_1000 = 0, 0
    for word in _WORD.findall(phrase):
        if word in _SCALES:
            finished, below_1000 = finished + (below_1000 or 1) * _SCALES[word], 0
        elif word == "hundred":
            below_1000 = 100 * (below_1000 or 1)
        elif word != "and":
            below_1000 += _ADDENDS[word]
    return finished + below_1000
