"""CRUXEval (arXiv 2401.03065): what does a function return, and which input makes it return a value?

Rows as the data set has them: `code` (a function f), `input` (the text of its arguments), `output` (the text of what it
returns). The model reasons, then answers between [ANSWER] and [/ANSWER] with a whole assertion. An answer is right if
it evaluates to a value that equals what it must, so every input that leads to the output is right.

Code runs in the sandbox and prints the value; values are compared here, where the program cannot see the expected one.
An output must be a value: f is not defined where it is evaluated.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_coreward.evaluation.sandbox import Limits, run_python

LIMITS = Limits(seconds=4.0, output_bytes=1 << 16)
_UNKNOWN = object()

_RULES = (
    "Think step by step. Then write the completed assertion between [ANSWER] and [/ANSWER], and nothing else.\n\n"
    "Example:\ndef f(text, n):\n    return text[:n] + str(n)\nassert f({arguments}) == {value}\n"
    '{thought}\n[ANSWER]assert f("abc", 2) == "ab2"[/ANSWER]\n\n'
)


def output_prompt(row: Mapping[str, Any]) -> str:
    """The question for the value that the function returns."""
    example = _RULES.format(
        arguments='"abc", 2', value="??", thought='The first two letters of "abc" are "ab"; "2" follows.'
    )
    return (
        "Complete the assertion with the value that the function returns for this input. Write the value itself, "
        f"not a call.\n{example}{row['code']}\nassert f({row['input']}) == ??\n"
    )


def input_prompt(row: Mapping[str, Any]) -> str:
    """The question for arguments that lead to the output."""
    example = _RULES.format(
        arguments="??", value='"ab2"', thought='"ab" and n = 2: every text that begins with "ab" will do.'
    )
    return (
        "Complete the assertion with arguments for which the function returns this value. There may be several; one "
        f"is enough.\n{example}{row['code']}\nassert f(??) == {row['output']}\n"
    )


def score_output(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """`acc` of a response: 1 if the value that it names is the function's."""
    answer = _answer(responses[0])
    predicted = None if answer is None else _side(answer, "value")
    return {"acc": float(predicted is not None and _equal(_evaluated("", predicted), row["output"]))}


def score_input(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """`acc` of a response: 1 if the function returns the output for the arguments that it names."""
    answer = _answer(responses[0])
    call = None if answer is None else _side(answer, "call")
    return {"acc": float(call is not None and _equal(_evaluated(row["code"], call), row["output"]))}


def _answer(response: str) -> str | None:
    """The text between the last tags; the closing one may be cut off, since generation stops at it."""
    _, tag, rest = response.rpartition("[ANSWER]")
    text = rest.partition("[/ANSWER]")[0].strip()
    return text if tag and text else None


def _side(answer: str, side: str) -> str | None:
    """The call of f or the value of `assert f(...) == ...`; a value may stand alone, as may a call or its arguments."""
    try:
        statement = ast.parse(answer).body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError, IndexError):
        return f"f({answer})" if side == "call" and not answer.startswith("assert") else None
    expression = statement.test if isinstance(statement, ast.Assert) else getattr(statement, "value", None)
    if isinstance(expression, ast.Compare) and len(expression.ops) == 1 and isinstance(expression.ops[0], ast.Eq):
        sides = [expression.left, expression.comparators[0]]
        calls = [_calls_f(each) for each in sides]
        expression = sides[calls[0] != (side == "call")]
    if not isinstance(expression, ast.expr):
        return None
    if side == "call" and not _calls_f(expression):
        return f"f({answer})"
    return ast.get_source_segment(answer, expression)


def _calls_f(expression: ast.expr) -> bool:
    return isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and expression.func.id == "f"


def _evaluated(code: str, expression: str) -> str | None:
    """The repr of an expression after some code, both untrusted. What the code prints itself is not in it."""
    program = (
        "import os\nresult, _ = os.dup(1), os.dup2(2, 1)\n"
        f"names = {{}}\nexec({code!r}, names)\nvalue = eval({expression!r}, names)\n"
        "os.write(result, repr(value).encode())\n"
    )
    outcome = run_python(program, limits=LIMITS)
    return outcome.output if outcome.status == "ok" else None


def _equal(shown: str | None, expected: str) -> bool:
    if shown is None:
        return False
    value, wanted = _literal(shown), _literal(expected)
    if value is _UNKNOWN or wanted is _UNKNOWN:
        return shown.strip() == expected.strip()
    return bool(value == wanted)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return _UNKNOWN
