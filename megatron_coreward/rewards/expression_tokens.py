"""The tokens of a scalar LaTeX expression: numbers, commands, names of functions, and single characters."""

import re

from megatron_coreward.rewards.expression import TRIGONOMETRIC

_INVERSE = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan"}
# How functions are written, as a command or as a plain word.
NAMED_FUNCTIONS = {
    **{name: name for name in TRIGONOMETRIC},
    **_INVERSE,
    **{name: name for name in ("exp", "ln", "log", "gcd", "lcm", "max", "min")},
    "lg": "log",
    "cis": "cis",
}

# `1.5e-3`, `1e-10` and `1e5` are numbers, `2e-1` and `2e+2` are sums with Euler's number.
_TOKENS = re.compile(
    r"\\[A-Za-z]+|\\.|(?:\d*\.\d+e[+-]?|\d+e(?:[+-](?=\d\d))?)\d{1,4}(?![A-Za-z\d])|\d+\.?\d*|\.\d+|[A-Za-z]+|\s+|.",
    re.ASCII,
)
_PLAIN_FUNCTION = re.compile(r"(?<![A-Za-z\\])(abs|floor|ceil|binom)(?=\()")
_WORDS = tuple(sorted((*NAMED_FUNCTIONS, "sqrt", "pi"), key=len, reverse=True))


def tokens_of(text: str) -> list[str]:
    """Numbers, commands, names of functions and single characters; a space is kept if it separates two numbers."""
    tokens: list[str] = []
    spaced = False
    for token in _TOKENS.findall(_PLAIN_FUNCTION.sub(r"\\\1 ", text)):
        if token.isspace():
            spaced = True
            continue
        if spaced and tokens and tokens[-1][0].isdigit() and (token[0].isdigit() or token[0] == "."):
            tokens.append(" ")
        spaced = False
        if token.isalpha() and len(token) > 1:
            tokens += _letters(token)
        else:
            tokens.append(token)
    return tokens


def _letters(word: str) -> list[str]:
    """A run of letters: function names are commands, all others variables of one letter each."""
    found: list[str] = []
    at = 0
    while at < len(word):
        name = next((name for name in _WORDS if word.startswith(name, at)), None)
        found.append(f"\\{name}" if name else word[at])
        at += len(name) if name else 1
    return found
