r"""Answers that the comparison of answers is tried on: spellings of one value, and strings that want to break it.

`variants` respells a real answer without changing what it says; `hostile` draws pairs without end. Both are functions
of their arguments alone (a case is the same in every run), and neither imports the code that they try.
"""

import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

MARKER = "hostile-answer-was-executed"  # the file that hostile code would leave in the working directory

Respelling = Callable[[str], str | None]  # None: does not apply to this answer

_INTEGER = re.compile(r"-?\d{1,3}(?:,?\\!)?(?:,\d{3})*|-?\d+")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_DIGIT_GROUPS = re.compile(r"-?\d{1,3}(,\d{3})+")
_LARGE = re.compile(r"-?\d{4,}")
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")


def variants(answer: str) -> Iterator[tuple[str, str]]:
    """(name of the respelling, respelt answer) for each respelling that applies."""
    for name, respell in RESPELLINGS.items():
        respelt = respell(answer)
        if respelt is not None and respelt != answer:
            yield name, respelt


def _value(answer: str) -> Fraction | None:
    """Of a plain integer, decimal or fraction; None for everything else."""
    plain = answer.replace(r",\!", "").replace(",", "") if re.fullmatch(r"-?\d{1,3}(,(\\!)?\d{3})+", answer) else answer
    if re.fullmatch(r"-?\d+", plain) or _DECIMAL.fullmatch(plain):
        return Fraction(plain)
    if match := _FRACTION.fullmatch(plain):
        return Fraction(int(match[1] + match[2]), int(match[3])) if int(match[3]) else None
    return None


def _number(respell: Callable[[Fraction], str | None]) -> Respelling:
    def apply(answer: str) -> str | None:
        value = _value(answer)
        return None if value is None else respell(value)

    return apply


def _suffix(text: str) -> Respelling:
    """Behind a plain number, such as a unit."""
    return lambda answer: None if _value(answer) is None else f"{answer}{text}"


def _frac(above: int, below: int, command: str = r"\frac") -> str:
    return f"{'-' if above < 0 else ''}{command}{{{abs(above)}}}{{{below}}}"


def _decimal(value: Fraction) -> str | None:
    """Exactly, or not at all."""
    below = value.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    if below != 1 or value.denominator > 10**6:
        return None
    digits = next(k for k in range(1, 25) if 10**k % value.denominator == 0)
    return f"{float(value):.{digits}f}" if abs(value) < 10**6 else None


def _separated(separator: str) -> Respelling:
    def apply(answer: str) -> str | None:
        return f"{int(answer):,}".replace(",", separator) if _LARGE.fullmatch(answer) else None

    return apply


def _top_level(answer: str, separator: str) -> list[str]:
    """The parts of an answer between separators outside every bracket; one part for an answer in brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"\\[A-Za-z]+|\\.|[()\[\]{{}}]|{re.escape(separator)}", answer):
        token = match[0]
        if token == separator and depth == 0:
            parts.append(answer[start : match.start()])
            start = match.end()
        elif token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
    return [part.strip() for part in (*parts, answer[start:])]


def _reordered(answer: str) -> str | None:
    plain = answer.lstrip("\\$ ")
    if _INTEGER.fullmatch(plain) or r"\!" in answer or r"\text" in answer or "=" in answer:
        return None
    parts = _top_level(answer, ",")
    return ", ".join(reversed(parts)) if len(parts) > 1 else None


def _as_set(answer: str) -> str | None:
    reordered = _reordered(answer)
    return None if reordered is None else rf"\left\{{ {reordered} \right\}}"


def _with_and(answer: str) -> str | None:
    reordered = _reordered(answer)
    if reordered is None:
        return None
    *parts, last = _top_level(reordered, ",")
    return rf"{', '.join(parts)} \text{{ and }} {last}"


def _numbers_inside(respell: Callable[[Fraction], str | None]) -> Respelling:
    """Each plain number of a list, tuple or set, respelt."""

    def apply(answer: str) -> str | None:
        match = re.fullmatch(r"(\(?|\[|\\left\(|\\\{)(.*?)(\)?|\]|\\right\)|\\\})", answer)
        parts = _top_level(match[2], ",") if match else []
        if match is None or len(parts) < 2 or r"\!" in answer or _DIGIT_GROUPS.fullmatch(answer.lstrip("\\$")):
            return None
        values = [_value(part) for part in parts]
        respelt = [respell(value) if value is not None else None for value in values]
        return match[1] + ", ".join(new or old for new, old in zip(respelt, parts, strict=True)) + match[3]

    return apply


def _unit_behind(text: str) -> Respelling:
    """Behind a length or an area that is no plain number: `3\\sqrt{2}`, `9\\pi`."""
    fits = re.compile(r"\d*\s*(\\sqrt\{?\d+\}?|\\pi|\\frac\{\d*\s*(\\pi|\\sqrt\{\d+\})\}\{\d+\})")
    return lambda answer: f"{answer}{text}" if fits.fullmatch(answer) else None


def _union_reordered(answer: str) -> str | None:
    parts = _top_level(answer, r"\cup")
    return r" \cup ".join(reversed(parts)) if len(parts) > 1 else None


def _sized_brackets(answer: str) -> str | None:
    if re.search(r"\\[()\[\]]", answer):  # math delimiters are no brackets
        return None
    if r"\left" in answer:
        return answer.replace(r"\left", "").replace(r"\right", "")
    sized = re.sub(r"\\\{|[(\[]", lambda match: rf"\left{match[0]}", answer)
    return re.sub(r"\\\}|[)\]]", lambda match: rf"\right{match[0]}", sized)


def _words_in(command: str) -> Respelling:
    def apply(answer: str) -> str | None:
        inside = re.fullmatch(r"\\text\{([A-Za-z ]+)\}", answer)
        words = inside[1] if inside else answer
        return f"\\{command}{{{words}}}" if _WORDS.fullmatch(words) else None

    return apply


def _spread_out(answer: str) -> str:
    """With white space between tokens, as far as that changes nothing: not within numbers, names and text."""
    tokens = re.findall(
        r"\\(?:text|mbox|mathrm)\{[^}]*\}|\\begin\{\w+\}|\\end\{\w+\}|\\[A-Za-z]+|\\.|[\d.,!]*\d|[A-Za-z]+|\S", answer
    )
    glued = "".join(tokens) != "".join(answer.split()) or r"\text" in answer or r"\!" in answer
    return f"  {answer}  " if glued else " ".join(tokens)


def _squeezed(answer: str) -> str | None:
    """Without the white space around operators and commas."""
    return None if r"\text" in answer else re.sub(r"\s*([-+=,<>])\s*(?!\\)", r"\1", answer)


def _denser(answer: str) -> str | None:
    r"""`\frac{1}{2}` as `\frac12`, `\sqrt{2}` as `\sqrt2`."""
    text = re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", answer)
    return re.sub(r"\\sqrt\{(\d)\}(?!\d)", r"\\sqrt\1", text)


RESPELLINGS: dict[str, Respelling] = {
    "white space around": lambda answer: f" \n {answer}\t ",
    "white space between tokens": _spread_out,
    "no white space": _squeezed,
    r"\dfrac": lambda answer: re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", answer),
    r"\tfrac": lambda answer: re.sub(r"\\d?frac(?![A-Za-z])", r"\\tfrac", answer),
    "arguments without braces": _denser,
    r"\left \right": _sized_brackets,
    r"\text around a word": _words_in("text"),
    r"\textbf around a word": _words_in("textbf"),
    r"\mathrm around a word": _words_in("mathrm"),
    r"\text around a number": lambda answer: (
        None if _value(answer) is None or "\\" in answer else rf"\text{{{answer}}}"
    ),
    "$": lambda answer: f"${answer}$",
    "$$": lambda answer: f"$${answer}$$",
    r"\( \)": lambda answer: rf"\({answer}\)",
    "full stop": lambda answer: f"{answer}.",
    r"unit \text{ cm}": _suffix(r"\text{ cm}"),
    r"unit \mbox{ inches}^2": _suffix(r"\mbox{ inches}^2"),
    r"unit \,\mathrm{m}": _suffix(r"\,\mathrm{m}"),
    "unit square feet": _suffix(r" \text{ square feet}"),
    "plain unit": _suffix(" dollars"),
    "dollars": _number(lambda value: rf"\${value}" if value.denominator == 1 and value >= 0 else None),
    r"^\circ": _suffix(r"^\circ"),
    r"^{\circ}": _suffix(r"^{\circ}"),
    "°": _suffix("°"),
    r"\degree": _suffix(r"\degree"),
    "degrees": _suffix(" degrees"),
    "without degrees": lambda answer: (
        None if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", answer) else re.sub(r"\^\{?\\circ\}?", "", answer)
    ),
    r"\%": _suffix(r"\%"),
    "%": _suffix("%"),
    "percent": _suffix(r" \text{ percent}"),
    "thousands ,": _separated(","),
    "thousands {,}": _separated("{,}"),
    r"thousands ,\!": _separated(r",\!"),
    r"thousands \,": _separated(r"\,"),
    "no thousands": lambda answer: answer.replace(r",\!", "") if r",\!" in answer else None,
    "trailing zero": _number(lambda value: f"{value}.0" if value.denominator == 1 else None),
    "trailing zeros": lambda answer: f"{answer}00" if _DECIMAL.fullmatch(answer) else None,
    "leading zero": lambda answer: (
        re.sub(r"^(-?)(\d+)(?=\.)", r"\g<1>0\2", answer) if _DECIMAL.fullmatch(answer) else None
    ),
    "reordered list": _reordered,
    "reordered set": _as_set,
    "list with and": _with_and,
    "decimals inside": _numbers_inside(lambda value: _decimal(value) if value.denominator > 1 else f"{value}.0"),
    "fractions inside": _numbers_inside(lambda value: _frac(2 * value.numerator, 2 * value.denominator)),
    "unit behind an expression": _unit_behind(r"\text{ cm}^2"),
    "plain unit behind an expression": _unit_behind(" square units"),
    "braces around scripts": lambda answer: re.sub(r"([\^_])(\w)(?![\w}])", r"\1{\2}", answer),
    "without percent": lambda answer: re.sub(r"\s*\\?%", "", answer),
    "without dollars": lambda answer: re.sub(r"\\?\$", "", answer),
    "display style": lambda answer: rf"\displaystyle {answer}",
    "thin spaces": lambda answer: answer.replace(", ", r",\, ") if r"\!" not in answer else None,
    r"\qquad": lambda answer: answer.replace(", ", r",\quad ") if r"\!" not in answer else None,
    "reordered union": _union_reordered,
    "fraction, not reduced": _number(lambda value: _frac(3 * value.numerator, 3 * value.denominator)),
    "fraction with a slash": _number(
        lambda value: f"{value.numerator}/{value.denominator}" if value.denominator > 1 else None
    ),
    "fraction with the sign above": _number(
        lambda value: rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else None
    ),
    "decimal of a fraction": _number(lambda value: _decimal(value) if value.denominator > 1 else None),
    "fraction of a decimal": lambda answer: (
        _frac(Fraction(answer).numerator, Fraction(answer).denominator) if _DECIMAL.fullmatch(answer) else None
    ),
    "assignment": lambda answer: (
        None if re.search(r"[=<>:]|\\(?:in|le|ge|ne|not|n?eq|equiv|n?mid|text)", answer) else f"x = {answer}"
    ),
}


# --- hostile strings ---------------------------------------------------------------------------------------------

_UNITS = (
    "9",
    "{",
    "}",
    "{}",
    "(",
    "[",
    "\\",
    "$",
    ",",
    " ",
    "\x00",
    "^",
    "^{",
    "_",
    "\\frac",
    "\\frac{",
    "\\sqrt{",
    "\\boxed{",
    "\\boxed{1}",
    "\\text{",
    "\\left(",
    "1,",
    "0.",
    "-",
    "x+",
    "\\\\",
    "\u0661",
    "\ud800",
    "\U0001f600",
    "&",
    "%",
    "!",
)
_OPENERS = (
    ("{", "}"),
    ("(", ")"),
    (r"\left(", r"\right)"),
    (r"\frac{1}{1+", "}"),
    (r"\sqrt{", "}"),
    ("[", "]"),
    ("x^{", "}"),
    (r"\text{", "}"),
    (r"\{", r"\}"),
    (r"\sin(", ")"),
    ("-(", ")"),
    ("|", "|"),
    (r"\boxed{", "}"),
)
_CODE = (
    "__import__('os').system('touch {m}')",
    "open('{m}','w').write('x')",
    "exec(\"open('{m}','w')\")",
    "eval(compile('open(\"{m}\",\"w\")','','exec'))",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: [open('{m}', 'w') for _ in iter(int, 1)]",
    r"\input{{/etc/passwd}}",
    r"\write18{{touch {m}}}",
    r"\immediate\write18{{touch {m}}}",
    r"\def\x{{\x\x}}\x",
    "while True: pass",
    "import os; os.fork()",
    "$(touch {m})",
    "`touch {m}`; touch {m}",
    "'; touch {m}; '",
    "{{{{7*7}}}}",
    "%s%n%x",
)
_BENIGN = ("1", "0", "x", r"\frac{1}{2}", r"\sqrt{2}", "(1,2)", r"\{1,2\}", "x=1", r"\text{even}", "[0,1)", r"2\pi")
_ALPHABET = "0123456789xyzijnme+-*/=<>^_{}()[]|\\,.;:!$%&~ \n"
_COMMANDS = (
    r"\frac",
    r"\sqrt",
    r"\int",
    r"\sum",
    r"\prod",
    r"\lim",
    r"\infty",
    r"\cup",
    r"\in",
    r"\le",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\left",
    r"\right",
    r"\text",
    r"\log",
    r"\sin",
    r"\pm",
    r"\binom",
    r"\cdot",
    r"\mod",
    r"\overline",
)


def _size(rng: random.Random, largest: int) -> int:
    """1 to `largest`, every order of magnitude as likely as any other."""
    return int(largest ** rng.random())


def _repeated(rng: random.Random) -> str:
    unit = rng.choice(_UNITS) * rng.choice((1, 1, 1, 2, 3)) + rng.choice(("", "", "", "1", "a"))
    return unit * (_size(rng, 1_000_000) // len(unit) + 1)


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice(_OPENERS)
    depth = _size(rng, 50_000) if rng.random() < 0.3 else rng.randint(1, 900 // len(opening + closing))
    return (
        opening * depth + rng.choice(("1", "x", "", "9^9")) + closing * max(0, depth - rng.choice((0, 0, 0, 1, depth)))
    )


def _tower(rng: random.Random) -> str:
    base, n = rng.randint(2, 99), rng.randint(3, 99)
    return rng.choice(
        (
            f"{base}^{{{n}^{{{n}^{{{base}}}}}}}",
            f"{base}^{{10^{{{n}}}}}",
            f"{n}{'!' * rng.randint(1, 9)}",
            f"(10^{{{n}}})!",
            rf"\binom{{10^{{{n}}}}}{{10^{{{n // 2}}}}}",
            f"x^{{{n}^{{{n}}}}}",
            rf"\sqrt[{n}^{{{n}}}]{{{base}}}",
            f"2^{{{'9' * n}}}",
            f"{n}^{{-{'9' * base}}}",
            f"e^{{e^{{e^{{{n}}}}}}}",
            f"1e{'9' * n}",
            f"{base}^{{{n}^{{{n}^{{{n}^{{{n}^{{{n}}}}}}}}}}}",
        )
    )


def _integral(rng: random.Random) -> str:
    n, m = rng.randint(2, 99), 10 ** rng.randint(1, 60)
    return rng.choice(
        (
            rf"\int_0^{{{m}}} x^{{{n}}}\sin(x^{{{n}}}) dx",
            rf"\int_0^\infty e^{{-x^{{{n}}}}}\ln^{{{n}}}(x) dx",
            rf"\sum_{{k=1}}^{{{m}}} k^{{{n}}}",
            rf"\prod_{{k=1}}^{{{m}}} (1+\frac{{1}}{{k^{{{n}}}}})",
            rf"\lim_{{x\to\infty}} (1+\frac{{{n}}}{{x}})^{{x^{{{n}}}}}",
            rf"\frac{{d^{{{n}}}}}{{dx^{{{n}}}}} \tan(x^{{{n}}})",
            r"\int " * n + "x" + " dx" * n,
            rf"\sum_{{n=1}}^{{\infty}}\frac{{1}}{{n^{{{n}}}}}",
        )
    )


def _large_algebra(rng: random.Random) -> str:
    n = rng.randint(3, 60)
    return rng.choice(
        (
            f"(x+y+z+{n})^{{{n}}}",
            "+".join(rf"\sqrt{{{k}}}" for k in range(2, n)),
            "".join(f"(x-{k})" for k in range(n)),
            r"\{" + ",".join(rf"\sqrt{{{k}+x}}" for k in range(n)) + r"\}",
            rf"\sqrt{{{n}+\sqrt{{{n}+\sqrt{{{n}}}}}}}",
            r"\begin{pmatrix}"
            + r"\\".join("&".join(f"{i}^{{{j}}}" for j in range(12)) for i in range(min(n, 12)))
            + r"\end{pmatrix}",
            rf"\frac{{{'9' * n * 4}}}{{{'7' * n * 4}}}",
            "9" * rng.randint(1, 999),
            f"x^{{{n}}}+{n}x+1=0",
            f"1/{'0' * n}",
            f"0.{'0' * n * 9}1",
        )
    )


def _noise(rng: random.Random) -> str:
    pieces = rng.choices((*_ALPHABET, *_COMMANDS), k=_size(rng, 400))
    return "".join(pieces)


def _bytes(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice((0, 0, 1, 7, 27, 127, 0x200E, 0x202E, 0xD800, 0xDFFF, 0xFEFF, 0x1F600, rng.randrange(0x10FFFF))))
        for _ in range(_size(rng, 2000))
    )


def _code(rng: random.Random) -> str:
    line = rng.choice(_CODE).format(m=MARKER)
    return rng.choice((line, f"{line} + {rng.randint(0, 999)}", rf"\text{{{line}}}", f"{line}\n" * rng.randint(1, 60)))


def _spliced(rng: random.Random) -> str:
    benign = rng.choice(_BENIGN)
    place = rng.randint(0, len(benign))
    return benign[:place] + rng.choice(FAMILIES[:-1])[0](rng)[: rng.randint(1, 500)] + benign[place:]


FAMILIES: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_repeated, 16),
    (_nested, 16),
    (_noise, 22),
    (_bytes, 10),
    (_code, 12),
    (_large_algebra, 8),
    (_tower, 2),
    (_integral, 2),
    (_spliced, 12),
)  # and how often each is drawn, in percent


def hostile(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs of answers, at least one of which is hostile; case i depends on the seed and on i alone."""
    draws, weights = zip(*FAMILIES, strict=True)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        draw = rng.choices(draws, weights)[0]
        first = draw(rng)
        other = rng.random()
        yield first, (rng.choice(_BENIGN) if other < 0.5 else draw(rng) if other < 0.8 else first + rng.choice(" 1x}"))
