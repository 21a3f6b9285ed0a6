"""Answers in words: without articles, and in one of several customary wordings."""

import re
from collections.abc import Callable

from megatron_coreward.rewards.expression import Node, number
from megatron_coreward.rewards.kinds import REALS, Phrase, Reading, Region, Scalar
from megatron_coreward.rewards.listing import CONJUNCTION

TEXT = re.compile(r"\\text\{([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:the|an?) (?=[a-z]{3})")
_WORDINGS = {  # other words for one thing, without an article
    **dict.fromkeys(
        ("no solutions", "there is no solution", "there are no solutions", "no solution exists"), "no solution"
    ),
    **dict.fromkeys(("no real solutions", "there are no real solutions"), "no real solution"),
    **dict.fromkeys(("dne", "doesn't exist", "limit does not exist"), "does not exist"),
    **dict.fromkeys(("infinitely many solutions", "infinite solutions", "infinite number of solutions"),
                    "infinitely many"),
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "set of all real numbers", "any real number"),
                    "real"),
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]{3,}|no", re.IGNORECASE | re.ASCII)
_SEVERAL_WORDS = re.compile(
    r"(?=.*[A-Za-z]{3})(?:[Aa](?= (?!sin|cos|tan|log|sqrt)[a-z]{3})|[A-Za-z][A-Za-z',.-]+)(?: [A-Za-z',.-]+)*"
)
_MATHEMATICAL_WORDS = frozenset({"infinity", "inf", "sin", "cos", "tan", "log"})
_SMALL_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL_NUMBERS)}
NUMBER_WORDS |= {ten: 10 * value for value, ten in enumerate(_TENS, 2)}
NUMBER_WORDS |= {
    f"{ten} {unit}": 10 * value + one
    for value, ten in enumerate(_TENS, 2)
    for one, unit in enumerate(_SMALL_NUMBERS[1:10], 1)
}


def phrase_of(text: str, read: Callable[[str], Reading]) -> Reading | None:
    """Words without mathematics."""
    words = TEXT.sub(r" \1 ", text)
    bare = " ".join(words.split()).strip(" .,;:!?'\"")
    if _WORD.fullmatch(bare) and bare.lower() not in _MATHEMATICAL_WORDS:
        return _spoken(bare)
    if bare.lower() in ("infinity", "inf"):
        return Scalar(Node("constant", "infinity"))
    if any(ord(char) > 0x2E7F for char in bare) and not any(char.isdigit() for char in bare):  # CJK
        return Phrase(plain_words(text))
    if _SEVERAL_WORDS.fullmatch(bare):
        if CONJUNCTION.search(bare) is None:
            return _spoken(bare)
        return read(bare) if bare != text else None
    return None


def _spoken(words: str) -> Reading:
    """Without the article in front, and in one of several customary wordings."""
    words = _ARTICLE.sub("", words.lower())
    words = _WORDINGS.get(words, words)
    if words.replace("-", " ") in NUMBER_WORDS:
        return Scalar(number(NUMBER_WORDS[words.replace("-", " ")]))
    return Region("union", (REALS,)) if words == "real" else Phrase(plain_words(words))


def plain_words(text: str) -> str:
    """A text by which phrases are compared: without macros, case and spaces."""
    return re.sub(r"[\s{}]+", "", TEXT.sub(r" \1 ", text)).casefold()
