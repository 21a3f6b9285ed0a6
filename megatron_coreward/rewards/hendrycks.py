r"""The normal form of an answer by the rules of the Hendrycks MATH benchmark (arXiv 2103.03874).

Two answers are the same if their normal forms are equal as strings. These are the rules by which the paper's release
rewards ground truth and validates; evaluation harnesses use them too. They are textual and know no mathematics: `0.5`
is `\frac{1}{2}`, but `0.25` is not `\frac{1}{4}`. The rules depend on their order, which is that of `normal_form`.

Invariants: pure; time is linear in the length of the answer; never raises for a string.
"""

import re

# Plain replacements, in order: line breaks, thin negative spaces, doubled backslashes, sizes of fractions and brackets,
# degrees, escaped dollar signs.
_BEFORE_UNITS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
# Percent signs, then a zero before a decimal point that follows a space or an opening brace.
_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))

_UNIT = "\\text{ "  # a text that begins with a space is a unit: it goes, with all that follows it
_LONGEST_NAME = 2  # characters before a lone equals sign that may be the name of a variable (`x`, `k `)
_SLASHED = re.compile(r"(-?[1-9][0-9]*|0)/(-?[1-9][0-9]*|0)")


def normal_form(answer: str) -> str | None:
    r"""The answer in normal form; None for one that the rules cannot read, which then equals its own spelling alone.

    Of one form are `\dfrac12`, `\tfrac{1}{2}`, `1/2` and `0.5`; `(1, 2)` and `\left(1,2\right)`; `90^\circ` and `90`;
    `10\text{ cm}` and `10`; `50\%` and `50`; `x = 5` and `5`; `\sqrt3` and `\sqrt{3}`. What the rules cannot read are
    two units, and a root or a fraction without an argument.
    """
    text = answer
    for old, new in _BEFORE_UNITS:
        text = text.replace(old, new)
    if text.count(_UNIT) > 1:
        return None
    text = text.partition(_UNIT)[0]
    for old, new in _AFTER_UNITS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = f"0{text}"
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= _LONGEST_NAME:
        text = value
    rooted = _brace_roots(text)
    if rooted is None:
        return None
    fractions = _brace_fractions(rooted.replace(" ", ""))
    if fractions is None:
        return None
    if fractions == "0.5":
        return "\\frac{1}{2}"
    slashed = _SLASHED.fullmatch(fractions)
    return f"\\frac{{{slashed[1]}}}{{{slashed[2]}}}" if slashed else fractions


def comparable(answer: str) -> str:
    """What is compared: the normal form, or for an answer without one its spelling, apart from every normal form."""
    form = normal_form(answer)
    return f"\0{answer}" if form is None else form


def _brace_roots(text: str) -> str | None:
    r"""`\sqrt3` as `\sqrt{3}`, which takes the one character that follows; None for a root of nothing."""
    before, *roots = text.split("\\sqrt")
    if not all(roots):
        return None
    return before + "".join(f"\\sqrt{root if root[0] == '{' else f'{{{root[0]}}}{root[1:]}'}" for root in roots)


def _brace_fractions(text: str) -> str | None:
    r"""`\frac12` as `\frac{1}{2}` and `\frac1{72}` as `\frac{1}{72}`; None for a fraction of nothing.

    A fraction of a single character leaves the whole text as it is.
    """
    before, *fractions = text.split("\\frac")
    braced = [before]
    for fraction in fractions:
        if not fraction:
            return None
        if fraction[0] == "{":
            braced.append(fraction)
        elif len(fraction) == 1:
            return text
        else:
            over, under = fraction[0], fraction[1]
            braced.append(f"{{{over}}}" + (under if under == "{" else f"{{{under}}}") + fraction[2:])
    return "\\frac".join(braced)
