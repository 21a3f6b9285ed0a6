"""Equations, inequalities and congruences, and the names that they give to values.

`read` reads the parts: a side of an equation may be of any kind.
"""

import re
from collections.abc import Callable

from megatron_coreward.rewards.brackets import top_level, walk
from megatron_coreward.rewards.expression import Node
from megatron_coreward.rewards.kinds import (
    Alternatives,
    Congruence,
    Equation,
    Items,
    Named,
    Phrase,
    Reading,
    Region,
    Scalar,
    assignments_of,
    half_line,
)
from megatron_coreward.rewards.scalars import equation_of, is_constant, node_of
from megatron_coreward.rewards.wordings import TEXT, plain_words

_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_CONGRUENCE = re.compile(
    r"(?:(.{1,30}?)\\equiv)?\s*(- ?\d{1,15}|\d{1,15})\s*\(?\\(?:pmod|bmod)\s*\{?\s*(\d{1,15})\s*\}?\s*\)?"
)
_RELATION_OPERATORS = r"\\(?:le|ge|ne|in|approx)(?![A-Za-z])|[=<>]"
_OTHER_RELATIONS = (
    r"\\(?:notin|equiv|mid|nmid|subset|subseteq|supset|propto|cong|simeq|perp|parallel|to|pmod)(?![A-Za-z])"
)
RELATION = re.compile(f"{_RELATION_OPERATORS}|{_OTHER_RELATIONS}")
FOREIGN = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|partial|nabla|begin)(?![A-Za-z])")
_NAME_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+){0,5}")


def relation_of(text: str, read: Callable[[str], Reading]) -> Reading | None:
    operators, sides = _split_relation(text)
    if not operators:
        return None
    if not all(sides):
        return _congruence(text) or Phrase(plain_words(text))
    if set(operators) <= {"=", r"\approx"}:
        return _equality(sides, operators, read) or Phrase(plain_words(text))
    if operators == [r"\in"]:
        name = name_of(sides[0])
        return Named(name, read(sides[1])) if name else Phrase(plain_words(text))
    return _inequality(operators, sides) or Phrase(plain_words(text))


def _equality(sides: list[str], operators: list[str], read: Callable[[str], Reading]) -> Reading | None:
    names = [name_of(side) for side in sides]
    if len(sides) > 2:
        return _chain(sides, names, read)
    (lhs, rhs), (left, right) = sides, names
    tuple_names = _tuple_of_names(lhs)
    values = read(rhs) if tuple_names else None
    if tuple_names and isinstance(values, Items) and values.brackets and len(values.items) == len(tuple_names):
        return assignments_of(tuple_names, list(values.items))
    equation = equation_of("=", lhs, rhs)
    if FOREIGN.search(lhs) and is_constant(rhs):  # a sum and what it is
        return Named(plain_words(lhs), read(rhs))
    if left and (right is None or not is_constant(lhs)):
        return _named(left, lhs, rhs, read)
    if right:
        return _named(right, rhs, lhs, read)
    if equation is None or (is_constant(lhs) and is_constant(rhs)):
        values_ = read(lhs), read(rhs)
        if all(isinstance(value, Scalar) for value in values_):
            # "2^{10} = 1024" ends in its value; "5 km = 5000 m" says one thing in two units
            units = [value.unit.dimension for value in values_ if isinstance(value, Scalar)]
            exact = r"\approx" not in operators
            return Alternatives(values_) if all(units) else Named("", values_[1], equation if exact else None)
    return equation


def _named(name: str, side: str, other: str, read: Callable[[str], Reading]) -> Named:
    r"""The value without its unit is a side of the equation, too: `\\angle A = 90^\\circ` is `\\angle A = 90`."""
    value, node = read(other), node_of(side)
    if isinstance(value, Scalar) and node is not None:
        return Named(name, value, Equation("=", node, value.node))
    return Named(name, value, equation_of("=", side, other))


def _congruence(text: str) -> Congruence | None:
    match = _CONGRUENCE.fullmatch(text)
    if match is None or not int(match[3]):
        return None
    name = name_of(match[1].strip()) if match[1] else ""
    modulus = int(match[3])
    return None if name is None else Congruence(int(match[2].replace(" ", "")) % modulus, modulus, name)


def _chain(sides: list[str], names: list[str | None], read: Callable[[str], Reading]) -> Reading | None:
    """`x = 3 \\cdot 4 = 12` is 12; `x = y = 0` are two values."""
    *firsts, last = names
    known = [name for name in firsts if name]
    if known and last is None:
        if len(known) == len(firsts) and len(set(known)) == len(known):
            return assignments_of(known, [read(sides[-1])] * len(known))
        if names[0]:
            return Named(names[0], read(sides[-1]))
    if all(is_constant(side) for side in sides):
        return Named("", read(sides[-1]))
    return None


def _inequality(operators: list[str], sides: list[str]) -> Reading | None:
    """Bounds of one variable are a region; other inequalities are compared as relations."""
    bounds = _bounds(operators, sides)
    if bounds is not None:
        return bounds
    if len(operators) == 1 and operators[0] in _MIRRORED:
        operator, lhs, rhs = operators[0], sides[0], sides[1]
        if operator in ("<", r"\le"):
            operator, lhs, rhs = _MIRRORED[operator], rhs, lhs
        return equation_of(operator, lhs, rhs)
    return None


def _bounds(operators: list[str], sides: list[str]) -> Region | None:
    if not set(operators) <= set(_MIRRORED) or len(sides) > 3:
        return None
    nodes = [node_of(side) for side in sides]
    if len(sides) == 2:
        if _is_variable(nodes[1]) and not _is_variable(nodes[0]):
            nodes, operators = nodes[::-1], [_MIRRORED[operators[0]]]
        variable, bound = nodes
        if variable is None or bound is None or not _is_variable(variable) or bound.symbols():
            return None
        return Region("union", (half_line(operators[0], bound),), variable.name)
    low, variable, high = nodes
    if low is None or variable is None or high is None or not _is_variable(variable) or r"\ne" in operators:
        return None
    if low.symbols() or high.symbols() or (operators[0] in "<\\le") != (operators[1] in "<\\le"):
        return None
    first = half_line(_MIRRORED[operators[0]], low)
    return Region("intersection", (first, half_line(operators[1], high)), variable.name)


def _split_relation(text: str) -> tuple[list[str], list[str]]:
    """The relations outside every bracket and the texts between them."""
    operators, sides, start = [], [], 0
    for position, token, depth in walk(text):
        if depth == 0 and RELATION.fullmatch(token):
            if re.fullmatch(_OTHER_RELATIONS, token):
                return [token], ["", ""]
            operators.append(token)
            sides.append(text[start:position].strip())
            start = position + len(token)
    return operators, [*sides, text[start:].strip()]


def assignment_of(text: str) -> tuple[str, str] | None:
    """(name, value) of `x = 4`; None for everything else."""
    operators, sides = _split_relation(text)
    if operators != ["="] or not all(sides):
        return None
    if name := name_of(sides[0]):
        return name, sides[1]
    return (name, sides[0]) if (name := name_of(sides[1])) else None


def _tuple_of_names(text: str) -> list[str] | None:
    if not (text.startswith("(") and text.endswith(")")):
        return None
    names = [name_of(part.strip()) for part in top_level(text[1:-1], ",")]
    known = [name for name in names if name]
    return known if len(known) == len(names) > 1 and len(set(known)) == len(known) else None


def name_of(text: str) -> str | None:
    r"""The name that an equation gives its other side, without spaces; None if the text is no name.

    Names are words, symbols, applications (`f(x)`, `P(A)`), lengths (`|AB|`), and sums and products of symbols.
    """
    if len(text) > 60:
        return None
    words = " ".join(TEXT.sub(r" \1 ", text).split())
    if _NAME_WORDS.fullmatch(words) and (r"\text" in text or len(words) > 3):
        return words.lower()
    node = node_of(text)
    if node is None or not node.symbols() or _has_number(node) or _is_plain_power(node):
        return None
    return text.replace(" ", "").replace("{", "").replace("}", "")


def _has_number(node: Node) -> bool:
    """Whether a number is a term or factor: `2x`, `x - 3`."""
    if node.op == "number":
        return node.number != -1
    if node.op in ("add", "multiply"):
        return any(_has_number(arg) for arg in node.args)
    return node.op == "power" and _has_number(node.args[0])


def _is_plain_power(node: Node) -> bool:
    """`x^2`, `|x|`: of one variable, whose value the equation leaves open."""
    plain = node.op == "power" or (node.op == "call" and node.name in ("abs", "factorial", "root"))
    return plain and node.args[0].op == "symbol" and not re.search(r"[fgh]", node.args[0].name)


def _is_variable(node: Node | None) -> bool:
    return node is not None and node.op == "symbol"
