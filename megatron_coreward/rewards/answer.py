r"""The final answer of a response: what stands in its last box or, where asked for, in another form.

Invariants: time is linear in the length of the text whatever it holds; never raises for a text.
"""

import re
from collections.abc import Sequence
from typing import get_args

from megatron_coreward.config.schema import AnswerFormat

# A control word that opens a box, any other control sequence (an escaped brace is no brace), or a brace.
_TOKEN = re.compile(r"\\(?P<box>boxed|fbox)(?![A-Za-z])(?:\s*(?P<open>\{))?|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed[ \t]+([^$\n{}]+)")


# "The final answer is", "Answer:", "**Answer** =", each up to where the answer starts.
_ANNOUNCED = re.compile(r"\banswer\b[*_]*+(?:\s++is\b)?+\s*+[:=]?+[\s*_]*+", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")
_LONE_VALUE = re.compile(r"[$*]*+[+-]?(?:\d[\d,]*+(?:\.\d++)?|\.\d++)(?:/\d++)?%?[$*.]*+|\${1,2}[^$]++\${1,2}\.?+")


def extract_answer(text: str, forms: Sequence[AnswerFormat] = ("boxed",)) -> str | None:
    r"""The final answer of `text` in the first of the given forms that it has; None where it has none of them.

    `boxed`: the last balanced `\boxed{...}`; `hashes`: what follows the last `####` on its line, as in GSM8K; `plain`:
    what the last "answer is", "answer:" or "answer =" announces, or else a last line that is nothing but a number or a
    formula between dollar signs. Raises ValueError for an unknown form.
    """
    for form in forms:
        if form not in _READERS:
            raise ValueError(f"unknown form of answers {form!r}; allowed: {', '.join(get_args(AnswerFormat))}")
        if (answer := _READERS[form](text)) is not None:
            return answer
    return None


def _hashes(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return _bare(after.split("\n", 1)[0]) if mark else None


def _plain(text: str) -> str | None:
    start = max((announced.end() for announced in _ANNOUNCED.finditer(text)), default=None)
    if start is not None:
        line = text[start:].split("\n", 1)[0]
        end = _SENTENCE_END.search(line)
        return _bare(line[: end.start()] if end else line)
    last_line = text.rstrip().rpartition("\n")[2].strip()
    return _bare(last_line) if _LONE_VALUE.fullmatch(last_line) else None


def _bare(answer: str) -> str | None:
    """Without the emphasis, the math delimiters and the full stop around it; None for nothing."""
    answer = answer.strip().strip("*_ ").rstrip(".")
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.endswith(closing):
            answer = answer[len(opening) : -len(closing)]
            break
    return answer.strip() or None


def _boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` of `text`, stripped; None where there is none or it is empty.

    Boxes that are never closed (a response that was cut) are passed over. "Last" is by opening, so of nested boxes the
    inner one counts. Without a balanced `\boxed{...}`, two forms of the published MATH helpers are read instead:
    `\boxed 5` up to the next dollar sign or the end of the line, then the last balanced `\fbox{...}`.
    """
    # What stands before the first box has no say: braces that are open there are closed after those of the boxes. Only
    # the backslashes right before it have, for one may escape the next.
    first = text.find("box")
    if first < 0:
        return None
    if text.startswith("f", max(0, first - 1)):
        first -= 1
    while first and text[first - 1] == "\\":
        first -= 1
    last: dict[str, tuple[int, int]] = {}  # box name -> span of the content of its last balanced box
    open_braces: list[tuple[str, int]] = []  # (box name or "" for a plain brace, start of the content)
    for token in _TOKEN.finditer(text, first):
        if token["open"]:
            open_braces.append((token["box"], token.end()))
        elif token[0] == "{":
            open_braces.append(("", token.end()))
        elif token[0] == "}" and open_braces:
            box, start = open_braces.pop()
            if box and start > last.get(box, (-1, -1))[0]:
                last[box] = (start, token.start())

    if "boxed" not in last and (unbraced := _UNBRACED.findall(text)):
        return unbraced[-1].strip() or None
    span = last.get("boxed") or last.get("fbox")
    return (text[slice(*span)].strip() or None) if span else None


_READERS = {"boxed": _boxed, "hashes": _hashes, "plain": _plain}
