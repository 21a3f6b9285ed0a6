r"""Reads scalar LaTeX expressions into trees: `\frac{0.5a}{b}`, `3\ln 2`, `\cos 58^\circ`, `f'(x)`.

Invariants: a tree says everything that the text says, or reading it fails (`Unreadable`): nothing is skipped, so no two
different texts become one tree by accident (`tests/rewards/test_expression_parser.py`). Reading takes time linear in
the length of the text, and nesting is bounded.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from megatron_coreward.rewards.expression import FUNCTIONS, Node, negative, number, quotient
from megatron_coreward.rewards.expression_tokens import NAMED_FUNCTIONS, tokens_of

MAX_NESTING = 60  # levels of a tree; deeper ones are no answers

_CONSTANTS = {"pi": "pi", "infty": "infinity", "imath": "i"}
_PREFIXES = frozenset(
    {"angle", "triangle", "measuredangle", "sim", "neg", "lnot", "nabla", "partial", "star", "square"}
)
_ACCENTS = frozenset(
    {"overline", "bar", "vec", "hat", "tilde", "widehat", "widetilde", "overrightarrow", "dot", "ddot", "underline"}
    | {"bold", "mathbb", "mathcal", "mathfrak", "mathscr", "overarc", "wideparen", "complement"}
)
_GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "rho", "varrho", "sigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega"),
    *("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar"),
    *("aleph", "Re", "Im", "ldots"),
}
_OPERATORS = {  # binary operations without arithmetic meaning here: never the same as any other
    *("wedge", "vee", "oplus", "otimes", "cap", "cup", "setminus", "to", "rightarrow", "perp", "parallel", "implies"),
    *("land", "lor", "iff", "Rightarrow", "leftrightarrow", "mapsto", "bullet", "ast", "cong", "circ"),
}
_OPENING = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
    r"\langle": r"\rangle",
}
_MULTIPLY = frozenset({"*", r"\cdot", r"\times", r"\ast"})
_DIVIDE = frozenset({"/", r"\div"})
_SEPARATORS = frozenset({",", "|", r"\mid", ";", "=", "<", ">", r"\le", r"\ge", r"\cap", r"\cup"})
_STOPS = frozenset(  # no factor begins with one of these
    {*")]}+-,=<>&;:", r"\mid", r"\le", r"\ge", r"\}", r"\rfloor", r"\rceil", r"\rangle"}
)


class Unreadable(ValueError):
    """The text is no scalar expression of the grammar below."""


@lru_cache(maxsize=8192)
def read_expression(text: str) -> Node:
    """The tree of a scalar expression in cleaned LaTeX (`latex.clean`). Raises Unreadable."""
    parser = _Parser(tokens_of(text))
    node = parser.sum(0)
    if parser.peek() is not None:
        raise Unreadable(f"{parser.peek()!r} in {text!r}")
    return node


class _Parser:
    """Recursive descent over tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._bars = self._norms = 0  # absolute values and norms that are open

    def peek(self, ahead: int = 0) -> str | None:
        at = self._at + ahead
        return self._tokens[at] if at < len(self._tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise Unreadable("the text ends too early")
        self._at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"{token!r} is missing")

    def sum(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise Unreadable("nested too deep")
        terms = []
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        while True:
            term = self.product(depth)
            terms.append(negative(term) if sign < 0 else term)
            if self.peek() not in ("+", "-"):
                break
            sign = 1
            while self.peek() in ("+", "-"):
                sign *= -1 if self.take() == "-" else 1
        return terms[0] if len(terms) == 1 else Node("add", args=tuple(terms))

    def product(self, depth: int, argument: bool = False) -> Node:
        r"""Factors side by side or under operators; as a function's `argument` (`\sin 2x`), up to the next function."""
        node = self.factor(depth)
        factors = [node]
        while (token := self.peek()) is not None and token not in _STOPS:
            if argument and (token in _MULTIPLY or token in _DIVIDE or token.removeprefix("\\") in NAMED_FUNCTIONS):
                break
            if (token == "|" and self._bars) or (token == r"\|" and self._norms):
                break
            if token in _MULTIPLY:
                self.take()
                factors.append(self.signed(depth))
            elif token in _DIVIDE:
                self.take()
                factors.append(Node("power", args=(self.signed(depth), number(-1))))
            elif token in (r"\mod", r"\bmod"):
                self.take()
                left = factors[0] if len(factors) == 1 else Node("multiply", args=tuple(factors))
                factors = [Node("free", "mod", args=(left, self.signed(depth)))]
            elif token.startswith("\\") and token[1:] in _OPERATORS:
                self.take()
                left = factors[0] if len(factors) == 1 else Node("multiply", args=tuple(factors))
                factors = [Node("free", token[1:], args=(left, self.product(depth)))]
            elif token == " ":  # "2 1/4" and, between scripts and factors, nothing
                self.take()
                if factors[-1].op == "number":
                    factors[-1] = self._mixed_part(factors[-1], self.plain_fraction())
            elif factors[-1].op == "number" and token[0] in "0123456789.":
                raise Unreadable("two numbers side by side")
            else:
                following = self.factor(depth)
                if token == r"\frac" and len(factors) == 1 and self._is_mixed(node, following):
                    factors = [self._mixed_part(node, following)]
                else:
                    factors.append(following)
        return factors[0] if len(factors) == 1 else Node("multiply", args=tuple(factors))

    def signed(self, depth: int) -> Node:
        if self.peek() in ("+", "-"):
            return negative(self.signed(depth)) if self.take() == "-" else self.signed(depth)
        return self.factor(depth)

    def plain_fraction(self) -> Node:
        above = self.take()
        self.expect("/")
        below = self.take()
        if not (above.isdigit() and below.isdigit() and int(below)):
            raise Unreadable("two numbers side by side")
        return quotient(number(int(above)), number(int(below)))

    @staticmethod
    def _is_mixed(whole: Node, part: Node) -> bool:
        """Whether `2\\frac{1}{4}` is a mixed number: a whole number before a fraction of plain numbers."""
        if whole.op != "number" or whole.number.denominator != 1 or part.op != "multiply" or len(part.args) != 2:
            return False
        above, below = part.args
        return above.op == "number" and below.op == "power" and below.args[0].op == "number"

    @staticmethod
    def _mixed_part(whole: Node, part: Node) -> Node:
        if whole.op != "number" or whole.number.denominator != 1:
            raise Unreadable("two numbers side by side")
        return Node("add", args=(whole, part))

    def factor(self, depth: int) -> Node:
        """An atom with its postfixes: scripts, primes, factorials, degrees."""
        node = self.atom(depth)
        while True:
            token = self.peek()
            if token == "^":
                self.take()
                node = self._raised(node, depth)
            elif token == "_":
                self.take()
                script = self._script_text()
                if node.op != "symbol":
                    raise Unreadable("a subscript of what is no name")
                node = Node("symbol", f"{node.name}_{script}")
            elif token == "'":
                self.take()
                node = Node("symbol", node.name + "'") if node.op == "symbol" else Node("free", "prime", args=(node,))
            elif token == "!":
                self.take()
                node = Node("call", "factorial", args=(node,))
            else:
                return node

    def _raised(self, node: Node, depth: int) -> Node:
        token = self.peek()
        if token in (r"\circ", r"\degree"):
            self.take()
            return _degrees(node)
        if token == "{" and self.peek(1) in (r"\circ", r"\degree") and self.peek(2) == "}":
            self._at += 3
            return _degrees(node)
        if token in (r"\prime", "*", r"\ast", r"\dagger"):
            self.take()
            return Node("free", f"^{token}", args=(node,))
        if token == "{" and self.peek(1) in (r"\prime", "*", r"\ast", "+", "-") and self.peek(2) == "}":
            name = f"^{self.peek(1)}"
            self._at += 3
            return Node("free", name, args=(node,))
        exponent = self.argument(depth)
        return Node("power", args=(node, exponent))

    def argument(self, depth: int) -> Node:
        """What a script or a command without braces takes: a group, or one token (all the digits of a number)."""
        if self.peek() == "{":
            return self.group(depth)
        if self.peek() in ("-", "+"):
            return negative(self.argument(depth)) if self.take() == "-" else self.argument(depth)
        return self.atom(depth + 1)

    def group(self, depth: int) -> Node:
        self.expect("{")
        node = self._inside("}", depth)
        return node

    def _inside(self, closing: str, depth: int) -> Node:
        bars, self._bars = self._bars, 0
        node = self.sum(depth + 1)
        self._bars = bars
        self.expect(closing)
        return node

    def _script_text(self) -> str:
        """The subscript as text: a name's index has no arithmetic."""
        token = self.take()
        if token != "{":
            return token
        inside, open_braces = [], 1
        while open_braces:
            token = self.take()
            open_braces += {"{": 1, "}": -1}.get(token, 0)
            inside.append(token)
        return "".join(inside[:-1])

    def _digit_argument(self, depth: int) -> Node:
        r"""An argument of `\frac` without braces is one digit: `\frac12`."""
        token = self.peek()
        if token and token[0].isdigit() and len(token) > 1:
            if not token.isdigit():
                raise Unreadable(r"an argument of \frac")
            rest = token[1:]
            self._tokens = [*self._tokens[: self._at], token[0], rest, *self._tokens[self._at + 1 :]]
            return number(int(self.take()))
        if token == " ":
            self.take()
        return self.argument(depth)

    def atom(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise Unreadable("nested too deep")
        token = self.take()
        if token.isascii() and (token[0].isdigit() or (token[0] == "." and len(token) > 1)):
            return number(Fraction(token))
        if token.startswith("\\"):
            return self._command(token[1:], depth)
        if token == "(":
            return self._inside(")", depth)
        if token == "{":
            return self._inside("}", depth)
        if token == "[":
            return Node("free", "[]", args=(self._inside("]", depth),))
        if token == "|":
            self._bars += 1
            node = self.sum(depth + 1)
            self._bars -= 1
            self.expect("|")
            return Node("call", "abs", args=(node,))
        if len(token) == 1 and token.isalpha():
            if token in "ei" and self.peek() not in ("_", "'"):
                return Node("constant", token)
            if token in "fghPEFGTQ" and self.peek() in ("(", "["):
                return self._application(token, depth)
            return Node("symbol", token)
        raise Unreadable(f"{token!r}")

    def _application(self, name: str, depth: int) -> Node:
        """`f(x, y)`, `P(A | B)`, `P(X = 2)`: what parts the arguments belongs to the name."""
        closing = _OPENING[self.take()]
        bars, self._bars = self._bars, 0
        args = [self.sum(depth + 1)]
        while self.peek() in _SEPARATORS:
            name += self.take()
            args.append(self.sum(depth + 1))
        self._bars = bars
        self.expect(closing)
        return Node("free", name, args=tuple(args))

    def _command(self, name: str, depth: int) -> Node:
        if name in _CONSTANTS:
            return Node("constant", _CONSTANTS[name])
        if name in ("frac", "binom"):
            first, second = self._digit_argument(depth), self._digit_argument(depth)
            return quotient(first, second) if name == "frac" else Node("call", "binom", args=(first, second))
        if name == "sqrt":
            return self._root(depth)
        if name in ("abs", "floor", "ceil") and self.peek() == "(":
            return self._function(name, depth)
        if name in NAMED_FUNCTIONS:
            return self._function(NAMED_FUNCTIONS[name], depth)
        if name == "lfloor" or name == "lceil":
            inside = self._inside(r"\rfloor" if name == "lfloor" else r"\rceil", depth)
            return Node("call", "floor" if name == "lfloor" else "ceil", args=(inside,))
        if name == "|":
            self._norms += 1
            norm = self.sum(depth + 1)
            self._norms -= 1
            self.expect(r"\|")
            # Nested bars look the same, and the norm of a number is its absolute value.
            return Node("free", "norm", args=(norm,)) if norm.symbols() else Node("call", "abs", args=(norm,))
        if name == "langle":
            args = [self.sum(depth + 1)]
            while self.peek() == ",":
                self.take()
                args.append(self.sum(depth + 1))
            self.expect(r"\rangle")
            return Node("free", "angles", args=tuple(args))
        if name in _ACCENTS:
            return Node("free", name, args=(_ordered(self.argument(depth)),))
        if name in _PREFIXES:
            return Node("free", name, args=(_ordered(self.product(depth + 1, argument=True)),))
        if name == "operatorname":
            return Node("free", self._script_text(), args=self._free_arguments(depth))
        if name in ("Pr", "det", "dim", "deg", "arg", "ker", "hom"):
            return Node("free", name, args=self._free_arguments(depth))
        if name in _GREEK:
            return Node("symbol", f"\\{name}")
        raise Unreadable(f"\\{name}")

    def _free_arguments(self, depth: int) -> tuple[Node, ...]:
        if self.peek() in ("(", "["):
            return self._application("", depth).args
        return (self.product(depth + 1, argument=True),)

    def _root(self, depth: int) -> Node:
        if self.peek() == "[":
            self.take()
            index = self._inside("]", depth)
            return Node("call", "root", args=(self.argument(depth), index))
        inside = self._inside(")", depth) if self.peek() == "(" and self.take() else self.argument(depth)
        return Node("call", "root", args=(inside, number(2)))

    def _function(self, name: str, depth: int) -> Node:
        base = exponent = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument(depth)
            else:
                exponent = self.argument(depth)
        inverse = exponent == number(-1) and f"a{name}" in FUNCTIONS
        if self.peek() == " ":
            self.take()
        if self.peek() == "(":
            self.take()
            args = [self._argument_list_item(depth)]
            while self.peek() == ",":
                self.take()
                args.append(self._argument_list_item(depth))
            self.expect(")")
        elif self.peek() == "{":
            args = [self.group(depth)]
        else:
            args = [self.product(depth + 1, argument=True)]
        if name == "log":
            args.append(base or number(10))
        elif base is not None:
            raise Unreadable(f"a base of {name}")
        name = f"a{name}" if inverse else name
        fewest, most = FUNCTIONS[name]
        if not fewest <= len(args) <= most:
            raise Unreadable(f"{len(args)} arguments of {name}")
        if name == "cis":  # cos + i sin
            name, args = "exp", [Node("multiply", args=(Node("constant", "i"), args[0]))]
        node = Node("call", name, args=tuple(args))
        return node if exponent is None or inverse else Node("power", args=(node, exponent))

    def _argument_list_item(self, depth: int) -> Node:
        bars, self._bars = self._bars, 0
        node = self.sum(depth + 1)
        self._bars = bars
        return node


def _ordered(node: Node) -> Node:
    """Letters side by side as one name: the angle ABC is not the angle ACB."""
    if node.op == "multiply" and all(arg.op == "symbol" for arg in node.args):
        return Node("symbol", "".join(arg.name for arg in node.args))
    return node


def _degrees(node: Node) -> Node:
    return Node("multiply", args=(node, Node("constant", "pi"), number(Fraction(1, 180))))
