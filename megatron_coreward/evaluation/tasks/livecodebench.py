"""LiveCodeBench's code generation (arXiv 2403.07974): a program for each problem, right if it passes all its tests.

Rows as the data set (`code_generation_lite`) has them: `question_content`, `starter_code` (empty: the program reads
its standard input), `public_test_cases` and `private_test_cases` (JSON; the private ones may be packed: base64 of zlib
of a pickled JSON text), `metadata` (JSON; `func_name` of problems with starter code).

Tests run in the sandbox, each in a process of its own with 6 seconds. Standard output is compared line by line without
outer blanks; lines that differ as text are equal if their numbers are. The arguments of a function are JSON, a line
each; what it returns is compared as JSON.
"""

import base64
import io
import json
import os
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.sandbox import Limits, run_python

LIMITS = Limits(seconds=6.0)

# Solutions are written as on the contests' sites, where these names are there.
_NAMES = "\n".join(
    f"from {module} import *"
    for module in (
        *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
        *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
    )
)
_PREAMBLE = (
    f"{_NAMES}\nimport bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator\n"
    "import random, re, statistics, string, sys\nsys.setrecursionlimit(50000)\n"
)
# Its own names are out of the solution's way; what the solution prints goes nowhere.
_CALL = """
import json as _json, os as _os, sys as _sys
_result = _os.dup(1)
_os.dup2(2, 1)
_arguments = [_json.loads(_line) for _line in _sys.stdin.read().splitlines() if _line.strip()]
_owner = Solution() if "Solution" in globals() else _sys.modules["__main__"]
with open(_result, "w") as _file:
    _json.dump(getattr(_owner, {name!r})(*_arguments), _file)
"""
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


def prompt(row: Mapping[str, Any]) -> str:
    """The problem, and how the program is to be written."""
    if row["starter_code"]:
        form = (
            "Complete this code. Put the whole program into one fenced code block.\n"
            f"```python\n{row['starter_code']}\n```"
        )
    else:
        form = (
            "Write a Python program that reads the input from standard input and prints the answer to standard output. "
            "Put the whole program into one fenced code block that begins with ```python."
        )
    return f"Solve this programming problem in Python.\n\n{row['question_content']}\n\n{form}\n"


def score(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """`acc` of a response: 1 if its last code block passes all tests of the problem."""
    code = extract_code(responses[0])
    return {"acc": float(code is not None and _passes_all(code, row))}


def extract_code(response: str) -> str | None:
    """The last whole code block; of a response that was cut off within its only block, none."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else None


def test_cases(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(input, expected output) of all tests. Raises InputError for a row that is packed in another way, or has none."""
    try:
        cases = [*json.loads(row["public_test_cases"]), *_unpacked(row["private_test_cases"])]
        pairs = [(case["input"], case["output"]) for case in cases]
    except (ValueError, KeyError, TypeError, zlib.error, pickle.UnpicklingError) as error:
        raise InputError(f"problem {row.get('question_id')}: its tests cannot be read ({error})") from None
    if not pairs:
        raise InputError(f"problem {row.get('question_id')}: it has no tests")
    return pairs


def _unpacked(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        return list(json.loads(text))
    packed = zlib.decompress(base64.b64decode(text))
    return list(json.loads(_TextOnly(io.BytesIO(packed)).load()))


class _TextOnly(pickle.Unpickler):
    """Unpickles a text: whatever would import a name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _passes_all(code: str, row: Mapping[str, Any]) -> bool:
    name = json.loads(row["metadata"] or "{}").get("func_name")
    program = _PREAMBLE + code + ("" if name is None else _CALL.format(name=name))
    same = _same_lines if name is None else _same_value

    def passes(case: tuple[str, str]) -> bool:
        outcome = run_python(program, case[0], LIMITS)
        return outcome.status == "ok" and same(outcome.output, case[1])

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        return all(all(pool.map(passes, cases)) for cases in _parts(test_cases(row), workers))


def _parts(cases: Sequence[tuple[str, str]], size: int) -> Iterator[Sequence[tuple[str, str]]]:
    """A failed test ends the matter, so only a few are under way at once."""
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def _same_value(printed: str, expected: str) -> bool:
    try:
        return bool(json.loads(printed) == json.loads(expected))
    except (ValueError, RecursionError):
        return False


def _same_lines(printed: str, expected: str) -> bool:
    found, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(found) == len(wanted) and all(map(_same_line, found, wanted))


def _same_line(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in wanted.split()]
    except InvalidOperation:
        return False
