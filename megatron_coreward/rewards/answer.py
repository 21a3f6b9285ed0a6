r"""The final answer of a response: the content of its last box or, if asked for, in another form.

Invariants: time is linear in the length of the text whatever it holds (times a logarithm with `stop_at`); never raises
for a text.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import get_args

from megatron_coreward.config.schema import AnswerFormat

# A control word that opens a box (its backslash may have been doubled), any other control sequence (an escaped brace is
# no brace), or a brace.
_TOKEN = re.compile(r"\\{1,4}(?P<box>boxed|fbox)(?![A-Za-z])(?:\s*(?P<open>\{))?|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed(?:[ \t]+|(?=\d))([^$\n{}]+)")
_EMPTY = re.compile(r"(?:\s|\\[,;:! ]|\.{2,}+|…|\\[lcd]?dots\b|_|\\(?:boxed|fbox)\s*+\{\s*+\})*+")

# "The final answer is", "Answer:", "**Answer** =", "The answer for x is", "答案是", each up to where the answer starts.
_ANNOUNCED = re.compile(
    r"""\banswer(?:s(?=\s+are\b))?\b[*_"]*+ (?:\ (?:for|to|of|in)\ [^.\n:=]{0,60}?)?
        (?: \s*+ (?:is|are|was|equals|(?:should|must|would|will)\ be) \b \s*+ [:=]?+ | \s*+ [:=] | \s*+ \n ) [\s*_]*+
      | 答案 (?:是|为|為)?+ \s*+ [:：=]?+ \s*+""",
    re.IGNORECASE | re.VERBOSE,
)
_LATER_REMARK = re.compile(  # "I hope this answer is helpful"
    r"(?:helpful|correct|right|wrong|incorrect|useful|clear|unclear|satisf\w+|complete|not|as follows|obvious|good|"
    r"what|shown|given above|given below|above|below|found|easy|unique|fine|ok|okay|sufficient|acceptable|reasonable|"
    r"your|the same)\b",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"(?:(?:therefore|thus|hence|simply|just|exactly|then|clearly|indeed|again|now|so|still|equal to|given by|option|"
    r"choice)\b[,:]?\s*)+",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\d|\\[A-Za-z]|\$|^\W*[A-Z]\W*$")
_TIME = re.compile(r"\d{1,2}(?::\d{2}){0,2}\s*[ap]\.?\s?m\b\.?", re.IGNORECASE | re.ASCII)
_SENTENCE_END = re.compile(
    r"\.(?=\s|$|[\"”])|。|,? (?:because|since|as|so that) |, (?:which|where|so|and so|as|that) |"
    r", and (?:the|this|that|it|we|he|she|they)\b| \((?:or|see|which|i\.e\.|that is|since|because|rounded|by)\b"
)
_LONE_VALUE = re.compile(r"[$*]*+[+\-−]?(?:\d[\d,]*+(?:\.\d++)?|\.\d++)(?:/\d++)?%?[$*.]*+|\${1,2}[^$]++\${1,2}\.?+")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ('"', '"'), ("“", "”"))


def extract_answer(text: str, forms: Sequence[AnswerFormat] = ("boxed",), stop_at: Sequence[str] = ()) -> str | None:
    r"""The final answer of `text` in the first of the given forms that it has; None if it has none of them.

    `boxed`: the last balanced `\boxed{...}` that is not empty; `hashes`: what follows the last `####` on its line, as
    in GSM8K; `plain`: what the last "answer is", "answer:" or "answer =" announces, or else a last line that is nothing
    but a number or a formula between dollar signs.

    Args:
        stop_at: strings that begin a follow-up which nobody asked for ("Question:"). What comes after the first of them
            that has an answer before it is not read.

    Raises ValueError for an unknown form.
    """
    unknown = [form for form in forms if form not in _READERS]
    if unknown:
        raise ValueError(f"unknown form of answers {unknown[0]!r}; allowed: {', '.join(get_args(AnswerFormat))}")
    starts = sorted({found for stop in stop_at for found in _occurrences(text, stop)})
    first = bisect_left(starts, True, key=lambda start: _first_form(text[:start], forms) is not None)
    return _first_form(text[: starts[first]] if first < len(starts) else text, forms)


def _first_form(text: str, forms: Sequence[AnswerFormat]) -> str | None:
    return next((answer for form in forms if (answer := _READERS[form](text)) is not None), None)


def _occurrences(text: str, stop: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(stop), text)] if stop else []


def _hashes(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    line = after.split("\n", 1)[0]
    announced = _ANNOUNCED.match(line.lstrip(" *_"))
    return _bare(line.lstrip(" *_")[announced.end() :] if announced else line) if mark else None


def _plain(text: str) -> str | None:
    """Of what is announced, the last that is a value; of words, the last that is no remark on the answer."""
    words = None
    announcements = list(_ANNOUNCED.finditer(text))
    ends = [announced.start() for announced in announcements[1:]] + [len(text)]
    for announced, end in reversed(list(zip(announcements, ends, strict=False))):
        candidate = _announced(" ".join(text[announced.end() : end].split("\n", 1)[0].split()))
        if candidate is None or _LATER_REMARK.match(candidate):
            continue
        if _VALUE.search(candidate):
            return candidate
        words = words or candidate
    if words or announcements:
        return words
    last_line = text.rstrip().rpartition("\n")[2].strip()
    return _bare(last_line) if _LONE_VALUE.fullmatch(last_line) else None


def _announced(line: str) -> str | None:
    """The answer at the start of a line, without the sentence that goes on behind it."""
    leading = _LEADING.match(line)
    line = line[leading.end() :] if leading else line
    if time := _TIME.match(line):
        return time[0]
    end = _SENTENCE_END.search(line)
    line = line[: end.start()] if end else line
    if "boxed" in line and (boxed := _boxed(line)) is not None:
        return boxed
    return _bare(line)


def _bare(answer: str) -> str | None:
    """Without the emphasis, the math delimiters, the quotation marks and the full stop around it; None for nothing."""
    answer = answer.strip().strip("*_ ").rstrip(".。")
    for opening, closing in _DELIMITERS:
        if len(answer) > len(opening + closing) and answer.startswith(opening) and answer.endswith(closing):
            answer = answer[len(opening) : -len(closing)]
            break
    return answer.strip() or None


def _boxed(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` of `text` that is not empty, stripped; None if there is none.

    Boxes that are never closed (a response that was cut) are passed over, and so are empty ones, which quote the
    instructions. "Last" is by opening, so of nested boxes the inner one counts. Without a balanced `\boxed{...}`, two
    forms of the published MATH helpers are read instead: `\boxed 5` up to the next dollar sign or the end of the line,
    then the last balanced `\fbox{...}`.
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
    doubled: set[int] = set()  # starts of the contents of boxes whose backslash was doubled
    for token in _TOKEN.finditer(text, first):
        if token["open"]:
            open_braces.append((token["box"], token.end()))
            if token.start("box") - token.start() in (2, 4):
                doubled.add(token.end())
        elif token[0] == "{":
            open_braces.append(("", token.end()))
        elif token[0] == "}" and open_braces:
            box, start = open_braces.pop()
            if box and start > last.get(box, (-1, -1))[0] and not _EMPTY.fullmatch(text, start, token.start()):
                last[box] = (start, token.start())

    if "boxed" not in last and (unbraced := _UNBRACED.findall(text)):
        return unbraced[-1].strip() or None
    span = last.get("boxed") or last.get("fbox")
    if not span:
        return None
    inner = last.get("fbox", (0, 0))
    if text[span[0] : span[1]].strip() == rf"\fbox{{{text[slice(*inner)]}}}":  # a box of the other kind, and only that
        span = inner
    content = text[slice(*span)].strip()
    return content.replace("\\\\", "\\") if span[0] in doubled else content


_READERS = {"boxed": _boxed, "hashes": _hashes, "plain": _plain}
