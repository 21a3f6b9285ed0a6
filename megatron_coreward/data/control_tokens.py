"""Control tokens that occur as text in a message: kept apart from those that the chat template writes.

If a message holds the text of a control token, that text is hidden from the template behind characters of Unicode's
private use. What is still a control token in the rendered text is the template's own; the text is cut there, as every
tokenizer cuts it first of all, and the parts between are tokenised with no control token in them.

Invariants (tests/data/test_control_tokens.py): messages without such text render to the very tokens that the tokenizer
gives; in others, the control tokens are those of the same conversation with harmless messages.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PRIVATE = [chr(number) for number in range(0xE000, 0xF8FF)]
_DIGITS = "0123456789"


def control_ids(added_tokens: Mapping[int, Any]) -> dict[str, int]:
    """Text to id of the control tokens among a tokenizer's added ones."""
    return {str(token.content): number for number, token in added_tokens.items() if token.special and token.content}


class Masks:
    """The control tokens that messages hold as text, and what hides each."""

    def __init__(self, ids: Mapping[str, int], contents: Sequence[str]) -> None:
        self._ids = ids
        longest_first = sorted(ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if ids else None
        held = sorted({found for text in contents for found in self._found(text)})
        if not held:
            self._hidden: dict[str, str] = {}
            self._shown: dict[str, str] = {}
            return
        used = set().union(*contents)
        free = [character for character in _PRIVATE if character not in used]
        begin, end, digits = free[0], free[1], free[2 : 2 + len(_DIGITS)]
        as_private = str.maketrans(dict(zip(_DIGITS, digits, strict=True)))
        # A mask takes no fewer bytes than its text (three a character): lengths that are estimated stay upper bounds.
        self._hidden = {
            text: f"{begin}{str(place).translate(as_private)}{end * (1 + len(text.encode()) // 3)}"
            for place, text in enumerate(held)
        }
        self._shown = {mask: text for text, mask in self._hidden.items()}

    def hide(self, content: str) -> str:
        """A message's content as the template may see it."""
        if self._pattern is None or not self._hidden:
            return content
        return self._pattern.sub(lambda found: self._hidden[found[0]], content)

    def show(self, text: str) -> str:
        """A text with what was hidden in it."""
        for mask, shown in self._shown.items():
            text = text.replace(mask, shown)
        return text

    def used_in(self, text: str) -> bool:
        """Whether anything is hidden in a text."""
        return any(mask in text for mask in self._shown)

    def split(self, text: str) -> list[str | int]:
        """A rendered text as the ids of the template's control tokens and, shown, the text between them."""
        assert self._pattern is not None
        parts: list[str | int] = []
        done = 0
        for found in self._pattern.finditer(text):
            parts += [self.show(text[done : found.start()]), self._ids[found[0]]]
            done = found.end()
        return [*parts, self.show(text[done:])]

    def _found(self, text: str) -> list[str]:
        return self._pattern.findall(text) if self._pattern is not None else []
