r"""The final answer of a response: what stands in its last box.

Invariants: one pass over the text, so time is linear in its length whatever it holds; never raises.
"""

import re

# A control word that opens a box, any other control sequence (an escaped brace is no brace), or a brace.
_TOKEN = re.compile(r"\\(?P<box>boxed|fbox)(?![A-Za-z])(?:\s*(?P<open>\{))?|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\boxed[ \t]+([^$\n{}]+)")


def extract_answer(text: str) -> str | None:
    r"""Content of the last balanced `\boxed{...}` of `text`, stripped; None where there is none or it is empty.

    Boxes that are never closed (a response that was cut) are passed over. "Last" is by opening, so of nested boxes the
    inner one counts. Without a balanced `\boxed{...}`, two forms of the published MATH helpers are read instead:
    `\boxed 5` up to the next dollar sign or the end of the line, then the last balanced `\fbox{...}`.
    """
    last: dict[str, tuple[int, int]] = {}  # box name -> span of the content of its last balanced box
    open_braces: list[tuple[str, int]] = []  # (box name or "" for a plain brace, start of the content)
    for token in _TOKEN.finditer(text):
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
