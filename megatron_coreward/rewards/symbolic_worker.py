"""The program of a comparison process: everything of `sameness.py`, and math-verify for what only it reads.

`symbolic.py` runs this file by its path, so that the process does not import the parent's main module. The process
forks a copy of itself, which does the comparing. The copy reads one JSON line per request from standard input,
`[request, texts, pairs, limit_s]`, with pairs of indices into the texts, and answers with JSON lines `verdicts`, one
letter a pair in order: s(ame), d(ifferent) or n(one). It says what it has after every pair that took long. It keeps the
letters in memory that it shares with the process: when it dies, the process says how, with the letters that were not
said yet, and forks the next copy within milliseconds.

A pair's limit counts the time that the copy computes, not the time that passes: a verdict must not depend on how busy
the machine is. math-verify's own time limits are off: they rely on a Python signal handler, which never runs while the
interpreter is inside one long big-integer operation. The copy lets the kernel end it: a timer per pair with the default
action, and a limit on its memory.

math-verify is loaded when the first answer needs it: its import takes longer than thousands of comparisons without it.
The copy then ends, the process that forked it loads math-verify, and the next copy has it.
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from mmap import mmap
from struct import Struct
from typing import Any

from megatron_coreward.rewards.arithmetic import Full
from megatron_coreward.rewards.reading import read
from megatron_coreward.rewards.sameness import same

MEMORY_LIMIT = 2 << 30  # bytes of address space; about 60 MiB are in use after start
RETIRE_ABOVE_KIB = 512 << 10  # resident set after which a copy makes room for a fresh one
RETIRED = 3  # exit status of a copy that did
NEEDS_MATH_VERIFY = 4  # exit status of a copy that met an answer which only math-verify reads

MAX_PAIRS = 1000  # of a request
SILENCE_S = 0.1  # after which a copy says what it has

_HEAD = Struct("qqq")

Foreign = Callable[[str, str], bool]


class _MathVerifyNeeded(Exception):
    pass


def main() -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints must not end up among the answers

        def answer(**message: object) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit_memory()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        logging.disable()
        foreign: Foreign = _needs_math_verify
        board = _Board()
        same(read("\\sqrt{8}"), read("2\\sqrt{2}"), Full(foreign))  # what is built at first use counts against no pair
        gc.freeze()  # what is loaded now is shared with every copy, not touched by its garbage collector
        answer(ready=True)
        while status := _in_a_copy(partial(_compare, Full(foreign), board, answer)):
            if status == NEEDS_MATH_VERIFY:
                try:
                    foreign = _load_math_verify()
                except Exception as error:
                    answer(error=f"{type(error).__name__}: {error}")
                    return
                gc.freeze()
            answer(died=status, **board.unsaid())


class _Board:
    """The request at hand, the verdicts on its pairs, and how many of them were said, in memory that forks share."""

    def __init__(self) -> None:
        self._memory = mmap(-1, _HEAD.size + MAX_PAIRS)

    def begin(self, request: int) -> None:
        self._request, self._known, self._said = request, 0, 0
        self._save()

    def add(self, letter: str) -> None:
        self._memory[_HEAD.size + self._known] = ord(letter)
        self._known += 1
        self._save()

    def _save(self) -> None:
        _HEAD.pack_into(self._memory, 0, self._request, self._known, self._said)

    def unsaid(self) -> dict[str, object]:
        """The message with the verdicts that were not said yet."""
        request, known, said = _HEAD.unpack_from(self._memory, 0)
        return {"request": request, "verdicts": self._memory[_HEAD.size + said : _HEAD.size + known].decode()}

    def say(self, answer: Callable[..., None]) -> None:
        message = self.unsaid()
        # Should it die right here, the verdicts are lost and the pairs compared again: better than said twice.
        self._said = self._known
        self._save()
        answer(**message)


def _compare(arithmetic: Full, board: _Board, answer: Callable[..., None]) -> int:
    """Answer requests until there are no more (0), math-verify is needed, or the memory has grown too much."""
    sys.setrecursionlimit(3000)
    for line in sys.stdin:
        request, texts, pairs, limit_s = json.loads(line)
        board.begin(request)
        last_said = time.monotonic()
        for first, second in pairs:
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            try:
                verdict: bool | None = same(read(texts[first]), read(texts[second]), arithmetic)
            except _MathVerifyNeeded:
                return NEEDS_MATH_VERIFY
            except (MemoryError, RecursionError):
                verdict = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            board.add({True: "s", False: "d", None: "n"}[verdict])
            if time.monotonic() - last_said > SILENCE_S:
                board.say(answer)
                last_said = time.monotonic()
        board.say(answer)
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # an answer has nothing to write
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _needs_math_verify(a: str, b: str) -> bool:
    raise _MathVerifyNeeded


def _load_math_verify() -> Foreign:
    """math-verify's verdict on two LaTeX texts, if it holds in both directions; verify() itself is not symmetric."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    # The answer stands alone in math mode: nothing is to be searched for in it, least of all a number to fall back on.
    # Units were read before, by a table that does not take letters of a formula for them.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    extraction = (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization),)

    @lru_cache(maxsize=4096)
    def parsed(latex: str) -> Any:
        return parse(f"${latex}$", extraction, extraction_mode="first_match", parsing_timeout=None)

    def far_apart(a: str, b: str) -> bool:
        """Whether two numbers differ in the first 15 digits: verify() rounds to 6 decimals."""
        values = []
        for latex in (a, b):
            expression = next(iter(parsed(latex)), None)
            if not isinstance(expression, Expr) or expression.free_symbols:
                return False
            try:
                values.append(complex(expression.evalf(25)))
            except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
                return False  # sympy has no digits of it: this says nothing, and the full comparison decides
        x, y = values
        return abs(x - y) > 1e-14 * max(abs(x), abs(y))

    def equivalent(a: str, b: str) -> bool:
        if far_apart(a, b):
            return False
        return all(
            verify(parsed(ground_truth), parsed(given), allow_set_relation_comp=True, timeout_seconds=None)
            for ground_truth, given in ((a, b), (b, a))
        )

    equivalent("x+x", "2x")  # what is built at first use is not to count against the first pair's limit
    return equivalent


if __name__ == "__main__":
    main()
