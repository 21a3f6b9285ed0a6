r"""Spelling of LaTeX answers: one table of rules, each with its reason, that takes many spellings of a text to one.

Invariants: pure and deterministic; an answer longer than `MAX_LENGTH` is not looked into, so the cost of one answer is
bounded; no rule changes what an answer says (units, words and kinds are read later, by `reading.py`); what is left is
still LaTeX.
"""

import re
from functools import lru_cache
from typing import NamedTuple

MAX_LENGTH = 1000  # characters; no final answer that means anything is longer

_NAME_ENDS = r"(?![A-Za-z])"
_FONT_MACROS = "text|textbf|textit|textrm|textnormal|textsf|texttt|textup|emph|mbox|hbox|operatorname|rm|bf|it|" + (
    "mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb"
)
_FUNCTION_NAMES = "sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|ln|log|lg|exp|gcd|lcm|max|min|Pr|det|cis"


class Rule(NamedTuple):
    """Replace what a regular expression matches, again and again if `repeat`."""

    pattern: str
    replacement: str
    reason: str
    repeat: bool = False


CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
        **dict.fromkeys("\u3000\u00a0\u2009\u202f", " "),
        **dict.fromkeys("\u200b\u200e\u200f\ufeff", ""),
        **dict.fromkeys("−–—‐‑", "-"),
        **dict.fromkeys("′’ʹ", "'"),
        **dict.fromkeys("、，", ","),
        **dict.fromkeys("。", "."),
        **{"″": "''", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "√": r"\sqrt "},
        **{"°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "∞": r"\infty ", "∅": r"\emptyset "},
        **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "±": r"\pm ", "∓": r"\mp ", "∠": r"\angle "},
        **{"ℝ": r"\mathbb{R}", "ℚ": r"\mathbb{Q}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}"},
        **{"π": r"\pi ", "Ω": r"\Omega ", "\u2126": r"\Omega ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta "},
        **{"…": r"\ldots ", "⋯": r"\ldots ", "∣": "|", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
        **{superscript: f"^{{{digit}}}" for superscript, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)},
        **{subscript: f"_{{{digit}}}" for subscript, digit in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)},
    }
)

RULES = (
    Rule(
        r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|strut|null|allowbreak|nobreak|bf|rm|it)" + _NAME_ENDS,
        " ",
        "says how it looks",
    ),
    Rule(r"\\(?:color|hspace|vspace|label|tag)\*?\s*\{[^{}]*\}", " ", "says how it looks"),
    Rule(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*", "", "says how it looks"),
    Rule(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)", "", "a box in the box"),
    Rule(r"\\(?:text)?(?:dollar|euro|sterling|yen)" + _NAME_ENDS, "$", "a currency sign"),
    Rule(r"\\text\s*\{\s*([,.:%])\s*\}", r"{\1}", "punctuation in a text macro"),
    Rule(r"\\text\s*\{\s*\\([%$])\s*\}", r"\\\1", "a sign in a text macro"),
    Rule(r"(?:US)?\\\$\s*(?=[-+]?[\d.\\(])", r" USD ", "a sign as a word"),
    Rule(r"€\s*(?=[-+]?[\d.\\(])", r" EUR ", "a sign as a word"),
    Rule(r"£\s*(?=[-+]?[\d.\\(])", r" GBP ", "a sign as a word"),
    Rule(r"¥\s*(?=[-+]?[\d.\\(])", r" JPY ", "a sign as a word"),
    Rule(r"₹\s*(?=[-+]?[\d.\\(])", r" INR ", "a sign as a word"),
    Rule(r"\\?[$€£¥₹₩₽]|(?<!\\)\\[()\[\]]", "", "a currency sign behind the value; math delimiters"),
    Rule(
        r"\s*\{\s*,\s*\}\s*(?=\d)|(?<=\d)(?:,?\s*\\!\s*|\\[,;: ]|~)(?=\d{3}(?!\d))",
        "",
        r"thousands: 1{,}000, 1,\!000, 1\,000",
    ),
    Rule(r"\{([,.:;%])\}", r"\1", "braces that only mend the spacing"),
    Rule(r"(?<!\\)\\!", "", "negative space"),
    Rule(r"(?<!\\)\\[,;:> ]|~|\\q?quad" + _NAME_ENDS + r"|\\(?:thin|med|thick|en)space" + _NAME_ENDS, " ", "space"),
    Rule(r"\\(?:left|right|middle)" + _NAME_ENDS + r"\s*\.?|\\[bB]igg?[lrm]?" + _NAME_ENDS, "", "size of brackets"),
    Rule(r"\\[dtc]frac" + _NAME_ENDS, r"\\frac", "size of fractions"),
    Rule(r"\\[dt]binom" + _NAME_ENDS, r"\\binom", "size of binomials"),
    Rule(
        r"\{((?:[^{}]|\{[^{}]*\})*?)\\choose" + _NAME_ENDS + r"((?:[^{}]|\{[^{}]*\})*)\}",
        r"\\binom{\1}{\2}",
        "plain TeX",
        True,
    ),
    Rule(
        r"\{((?:[^{}]|\{[^{}]*\})*?)\\over" + _NAME_ENDS + r"((?:[^{}]|\{[^{}]*\})*)\}",
        r"\\frac{\1}{\2}",
        "plain TeX",
        True,
    ),
    Rule(r"^([^{}]*?)\\over" + _NAME_ENDS + r"([^{}]*)$", r"\\frac{\1}{\2}", "plain TeX"),
    Rule(r"\\(le|ge|ne)q?q?(?:slant)?" + _NAME_ENDS + r"|\\(le|ge)qq" + _NAME_ENDS, r"\\\1\2", "one name a relation"),
    Rule(r"\\not\s*=|!=", r"\\ne ", "one name a relation"),
    Rule(r"\\lt" + _NAME_ENDS + r"|&lt;", "<", "one name a relation"),
    Rule(r"\\gt" + _NAME_ENDS + r"|&gt;", ">", "one name a relation"),
    Rule(r"<=|=<", r"\\le ", "plain text"),
    Rule(r">=|=>", r"\\ge ", "plain text"),
    Rule(r"\\lbrace" + _NAME_ENDS, r"\\{", "one name a bracket"),
    Rule(r"\\rbrace" + _NAME_ENDS, r"\\}", "one name a bracket"),
    Rule(r"\\lbrack" + _NAME_ENDS, "[", "one name a bracket"),
    Rule(r"\\rbrack" + _NAME_ENDS, "]", "one name a bracket"),
    Rule(r"\\[lr]vert" + _NAME_ENDS + r"|\\vert" + _NAME_ENDS, "|", "one name a bracket"),
    Rule(r"\\[lr]?Vert" + _NAME_ENDS + r"|\|\|", r"\\|", "one name a bracket"),
    Rule(r"\\(?:varnothing|emptyset)" + _NAME_ENDS + r"|\\\{\s*\\\}", r"\\emptyset ", "one name for the empty set"),
    Rule(r"\\(?:colon|ratio)" + _NAME_ENDS, ":", "one name a sign"),
    Rule(r"\\(?:c|l|v|d)?dots[cbmio]?" + _NAME_ENDS + r"|\.\.\.", r"\\ldots ", "one name for what goes on"),
    Rule(r"\\(?:bmod|mod)" + _NAME_ENDS + r"|\\text\s*\{\s*mod\s*\}", r"\\bmod ", "one name an operator"),
    Rule(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime" + _NAME_ENDS + ")", "'", "one name a sign"),
    Rule(r"\^\s*\{\s*\\prime\s*\\prime\s*\}", "''", "one name a sign"),
    Rule(
        r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\degree" + _NAME_ENDS + r"|(?<!\^)\\degree" + _NAME_ENDS,
        r"^\\circ ",
        "degrees",
    ),
    Rule(r"\s+\^\s*\\circ", r"^\\circ", "degrees"),
    Rule(r"\\(?:mathrm|mathbf|mathit|bm|boldsymbol)\s+([A-Za-z\d])", r" \1", "a letter in another font is that letter"),
    Rule(r"\*\*", "^", "plain text"),
    Rule(r"\\%", "%", "one name a sign"),
    Rule(
        rf"\\(?:{_FONT_MACROS})\s*\{{\s*\\?({_FUNCTION_NAMES})\s*\}}", r"\\\1 ", "functions in letters of another font"
    ),
    Rule(rf"\\(?:{_FONT_MACROS})\s*\{{([^{{}}A-Za-z\\]*)\}}", r"\1", "a number in another font is that number"),
    Rule(
        r"\\(?:boldsymbol|bm|pmb|mathbf|mathit|mathrm|mathsf|mathnormal)\s*\{((?:[^{}]|\{[^{}]*\})*\\(?:[^{}]|\{[^{}]*\})*)\}",
        r"{\1}",
        "mathematics in another font is that mathematics",
        True,
    ),
    Rule(rf"\\(?:{_FONT_MACROS})" + _NAME_ENDS + r"\s*\{\s*", r"\\text{", "words are words in every font"),
    Rule(r"(\\text\{[^{}]*\^)\s*\{\s*(-?\d+)\s*\}", r"\1\2", "powers of units", True),
)

_COMPILED = tuple((re.compile(rule.pattern), rule.replacement, rule.repeat) for rule in RULES)
_PUNCTUATION = ".,;: "


def clean(answer: str) -> str:
    """The answer in the spelling of `RULES`; an answer longer than `MAX_LENGTH` as it is."""
    # Not remembered: a memory of megabyte answers would be gigabytes.
    return answer.strip() if len(answer) > MAX_LENGTH else _clean(answer)


@lru_cache(maxsize=8192)
def _clean(answer: str) -> str:
    text = _collapse(answer.translate(CHARACTERS))
    for pattern, replacement, repeat in _COMPILED:
        text, count = pattern.subn(replacement, text)
        while repeat and count:
            text, count = pattern.subn(replacement, text)
    text = _collapse(text)
    bare = text.rstrip(_PUNCTUATION)
    text = bare if bare and not bare.endswith("\\") else text
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text or answer.strip()


def closing_brace(text: str, opening: int) -> int:
    """Index of the brace that closes the one at `opening`; -1 if none does."""
    depth = 0
    for token in _BRACE.finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return -1


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _collapse(text: str) -> str:
    """With single spaces for white space of every kind, and none at the ends."""
    return " ".join(text.split())
