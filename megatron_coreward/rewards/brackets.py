"""Texts with brackets: where they are cut, and how deep they go."""

import re
from collections.abc import Iterator

from megatron_coreward.rewards.latex import closing_brace

MAX_DEPTH = 30  # brackets open at once; what is nested deeper is no answer
_OPEN = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1, r"\{": 1, r"\}": -1, r"\langle": 1, r"\rangle": -1}
_BRACKETS = re.compile(r"\\begin(?![A-Za-z])|\\end(?![A-Za-z])|\\[A-Za-z]+|\\.|[()\[\]{}]|.", re.DOTALL)


def outer(text: str) -> str:
    """Without the braces around everything and the punctuation behind."""
    text = text.strip()
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text.rstrip(".,;: ") or text


def depth_of(text: str) -> int:
    """How many brackets are open at once, at most; those that nothing closes count."""
    depth = deepest = 0
    for token in _BRACKETS.finditer(text):
        depth += _OPEN.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def walk(text: str) -> Iterator[tuple[int, str, int]]:
    """(position, token, brackets open before it) for each token."""
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match[0]
        if token == r"\end":
            depth -= 1
        step = _OPEN.get(token, 0)
        if step < 0:
            depth += step
        yield match.start(), token, depth
        if step > 0:
            depth += step
        if token == r"\begin":
            depth += 1


def top_level(text: str, separator: str) -> list[str]:
    """The parts of a text between separators outside every bracket."""
    parts, start = [], 0
    for position, token, depth in walk(text):
        if token == separator and depth == 0:
            parts.append(text[start:position])
            start = position + len(separator)
    return [*parts, text[start:]]


def encloses(text: str, opening: int) -> bool:
    """Whether the bracket at the start is closed by the one at the end."""
    return all(depth > 0 or position in (0, len(text) - 1, len(text) - 2) for position, _, depth in walk(text)
               if 0 < position < len(text) - 1 - opening)  # fmt: skip
