"""The program of a comparison process: math-verify and nothing else of this package.

`symbolic.py` runs this file by its path, so that the process imports neither the parent's main module nor this package.
The process loads math-verify once, says whether that worked, and forks a copy of itself, which does the comparing. The
copy reads one JSON line `[pair, a, b, limit_s]` per pair from standard input and answers each with a JSON line. Where
it dies, the process says so and forks the next copy: milliseconds, where loading math-verify takes a second.

math-verify's own time limits are off: they rely on a Python signal handler, which never runs while the interpreter
is inside one long big-integer operation. The copy instead lets the kernel end it: an alarm per pair with the default
action, and a limit on its memory. So it outlives neither its limit nor, for longer than that, whoever asks.

Most pairs are far apart as numbers. So each answer is first evaluated, its variables at fixed points; math-verify,
which takes milliseconds for a pair, is asked only where the values are close or there are none. It rounds to 6 decimals
and never equates values that are further apart.
"""

import gc
import json
import logging
import os
import re
import resource
import signal
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

MEMORY_LIMIT = 2 << 30  # bytes of address space; about 60 MiB are in use after start
RETIRE_ABOVE_KIB = 512 << 10  # resident set after which a copy makes room for a fresh one
RETIRED = 3  # exit status of a copy that did
FAR_APART = 1e-3  # relative distance of two values that are different whatever math-verify rounds to
FAR_FROM_ZERO = 1e-4  # the same as an absolute distance; math-verify rounds to 1e-6

_RATIONAL = re.compile(r"-?\d{1,300}(/\d{1,300})?", re.ASCII)


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints must not end up among the answers

        def answer(**message: object) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        logging.disable()
        try:
            equivalent = _load()
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # an answer has nothing to write
        gc.freeze()  # what is loaded now is shared with every copy, not touched by its garbage collector
        answer(ready=True)
        while status := _in_a_copy(lambda: _compare(equivalent, answer)):
            if status != RETIRED:
                answer(died=status)


def _compare(equivalent: Callable[[str, str], bool], answer: Callable[..., None]) -> int:
    """Answer pairs until there are no more (0) or the memory has grown too much (RETIRED)."""
    for line in sys.stdin:
        pair, a, b, limit_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        verdict = equivalent(a, b)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(pair=pair, equivalent=verdict)
        if _resident_kib() > RETIRE_ABOVE_KIB:
            return RETIRED
    return 0


def _in_a_copy(work: Callable[[], int]) -> int:
    """The exit status of a forked copy that does the work: what the work returns, or how it died."""
    if copy := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    status = 1
    try:
        status = work()
    finally:  # whatever happens, the copy must not go on as its parent would
        os._exit(status)


def _resident_kib() -> int:
    """Resident set of this process. (`ru_maxrss` starts at that of the parent that made it, which may be gigabytes.)"""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() >> 10


def _limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _load() -> Any:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Derivative, Expr, Integral, Limit, Product, Sum, nan, zoo

    # The answer stands alone in math mode: nothing is to be searched for in it, least of all a number to fall back on.
    extraction = (LatexExtractionConfig(boxed_match_priority=-1),)
    unevaluated = (Derivative, Integral, Limit, Product, Sum)  # to evaluate them may take longer than to compare them

    @lru_cache(maxsize=4096)
    def parsed(latex: str) -> Any:
        return parse(f"${latex}$", extraction, extraction_mode="first_match", parsing_timeout=None)

    @lru_cache(maxsize=16384)
    def value(latex: str) -> complex | None:
        """Of an expression at a fixed point of its variables; None for sets, relations and what has no value."""
        if _RATIONAL.fullmatch(latex):
            return _finite(Fraction, latex)
        expression = next(iter(parsed(latex)), None)
        if not isinstance(expression, Expr) or expression.has(*unevaluated, nan, zoo):
            return None
        point = {symbol: _coordinate(symbol.name) for symbol in expression.free_symbols}
        return _finite(expression.evalf, 20, point)

    def equivalent(a: str, b: str) -> bool:
        """math-verify's verdict where it holds in both directions; verify() itself is not symmetric."""
        x, y = value(a), value(b)
        if x is not None and y is not None and abs(x - y) > max(FAR_FROM_ZERO, FAR_APART * max(abs(x), abs(y))):
            return False
        return all(
            verify(parsed(ground_truth), parsed(given), allow_set_relation_comp=True, timeout_seconds=None)
            for ground_truth, given in ((a, b), (b, a))
        )

    equivalent("x+x", "2x")  # what is built at first use is not to count against the first pair's limit
    return equivalent


def _coordinate(name: str) -> float:
    """Where a variable is evaluated: in 1..2, by its name alone."""
    return 1.0 + (zlib.crc32(name.encode(errors="surrogatepass")) % 99991 + 0.5) / 99991


def _finite(evaluate: Any, *arguments: Any) -> complex | None:
    """The value as a complex number; None where it is none or too large for one."""
    try:
        value = complex(evaluate(*arguments))
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        return None
    return value if abs(value) < 1e150 else None


if __name__ == "__main__":
    main()
