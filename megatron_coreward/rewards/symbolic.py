"""Comparison behind hard limits: a pool of killable processes.

Invariants: a comparison that computes longer than the limit is killed, never waited for, and says so; one whose process
died or made no progress for other reasons is tried once more, and then has no verdict at all. A process starts when a
request first needs it and is reused after that. Safe to call from several threads: each request borrows one process.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_coreward.errors import RunError

WORKER_PROGRAM = Path(__file__).with_name("symbolic_worker.py")
PACKAGE_FOLDER = Path(__file__).parents[2]
# What a process needs to find its interpreter and packages: no tokens, no keys, nothing else of the parent's.
INHERITED = frozenset({"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})
STALL_FACTOR = 10.0  # of the limit on computing: how long a pair may take on a busy machine before it is given up
OVERTIME_S = 2.0  # added to that
START_LIMIT_S = 120.0  # starting and loading math-verify take a second, more on a crowded machine or a cold disk
ATTEMPTS = 2  # at a pair whose process died or stalled
SLICE = 200  # pairs of one question that a process is handed at a time

# Statuses with which the process that compares ends; see `symbolic_worker.py`.
_RETIRED, _NEEDS_MATH_VERIFY, _OVER_LIMIT = 3, 4, -signal.SIGPROF

# over_limit: the pair was computed on for the whole limit; lost: its process died or stood still.
Outcome = bool | Literal["over_limit", "lost"]


_OUTCOMES: dict[str, Outcome] = {"s": True, "d": False, "n": "over_limit"}


@dataclass(frozen=True, slots=True)
class Request:
    """Pairs to compare, by index into the texts; answers of one question belong together, for each is read once."""

    texts: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


class Comparer(Protocol):
    """What compares the requests of a whole step: a pool of this machine, or one that spreads them over several."""

    def compare(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """The outcome of every pair of every request. Raises RunError if no process can be started at all."""

    def close(self) -> None:
        """End the processes. The next request starts them again."""


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


class SymbolicPool:
    """Comparison processes of this machine.

    timeout_s: how long a pair may be computed, in seconds of processor time. num_workers: None for one a core.
    """

    def __init__(self, timeout_s: float, num_workers: int | None = None) -> None:
        num_workers = available_cores() if num_workers is None else num_workers
        if timeout_s <= 0 or num_workers < 1:
            raise ValueError(f"need timeout_s > 0 and num_workers >= 1, got {timeout_s} and {num_workers}")
        self._timeout_s = timeout_s
        self._num_workers = num_workers
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a place whose process is not started
        for _ in range(num_workers):
            self._idle.put(None)

    def equivalent(self, a: str, b: str) -> bool | None:
        """Whether two answers are the same; None if the limit or the process did not allow a verdict."""
        ((outcome,),) = self.compare([Request((a, b), ((0, 1),))])
        return outcome if isinstance(outcome, bool) else None

    def compare(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """See `Comparer`. The slowest questions, those with most pairs, are handed out first."""
        outcomes: list[list[Outcome]] = [["lost"] * len(request.pairs) for request in requests]
        work: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        slices = [
            (index, start) for index, request in enumerate(requests) for start in range(0, len(request.pairs), SLICE)
        ]
        for piece in sorted(slices, key=lambda piece: -min(len(requests[piece[0]].pairs) - piece[1], SLICE)):
            work.put(piece)
        failures: list[BaseException] = []

        def serve() -> None:
            try:
                while not failures:
                    index, start = work.get_nowait()
                    pairs = requests[index].pairs[start : start + SLICE]
                    outcomes[index][start : start + SLICE] = self._outcomes(Request(requests[index].texts, pairs))
            except queue.Empty:
                pass
            except BaseException as error:  # of any thread, for the caller
                failures.append(error)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(self._num_workers, len(slices)) - 1)]
        for thread in threads:
            thread.start()
        serve()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return outcomes

    def _outcomes(self, request: Request) -> list[Outcome]:
        """Of one request, by one process after another as long as they die."""
        outcomes: list[Outcome] = []
        attempts = 0
        worker, keep = self._idle.get(), False
        try:
            while len(outcomes) < len(request.pairs):
                if worker and not worker.is_alive():
                    worker.kill()
                    worker = None
                worker, keep = worker or _Worker(), False
                before = len(outcomes)
                ending = worker.ask(request, outcomes, self._timeout_s)
                keep = ending is not None
                if ending in (0, _RETIRED, _NEEDS_MATH_VERIFY) or len(outcomes) == len(request.pairs):
                    # all answered, or the next copy goes on
                    continue
                attempts = attempts + 1 if len(outcomes) == before else 1
                if ending == _OVER_LIMIT:
                    outcomes.append("over_limit")
                    attempts = 0
                elif attempts >= ATTEMPTS:
                    outcomes.append("lost")
                    attempts = 0
                if ending is None:
                    worker.kill()
                    worker = None
            return outcomes
        finally:  # an interrupt ends the process too: its answer would be taken for that of the next pair
            if worker and not keep:
                worker.kill()
            self._idle.put(worker if keep else None)

    def close(self) -> None:
        """End the processes. The pool stays usable: the next pair starts one again."""
        for worker in [self._idle.get() for _ in range(self._num_workers)]:
            if worker:
                worker.kill()
            self._idle.put(None)


class _Worker:
    """A comparison process, which forks those that compare (see `symbolic_worker.py`), and the pipes to them."""

    def __init__(self) -> None:
        self._request = 0
        self._received = b""
        environment = {name: value for name, value in os.environ.items() if name in INHERITED}
        paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(PACKAGE_FOLDER)]
        # A fresh interpreter in a session of its own: no copied memory, no inherited file, no preloaded library and no
        # secret of the parent's, no Ctrl-C that is meant for the parent; -P keeps this folder off its module path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        )
        greeting = self._receive(time.monotonic() + START_LIMIT_S) or {}
        if "ready" not in greeting:
            self._fail(greeting)

    def _fail(self, reply: dict[str, Any]) -> None:
        self.kill()
        reason = reply.get("error", f"exit status {self._process.returncode} within {START_LIMIT_S:.0f} s")
        raise RunError(f"the process for symbolic comparison did not start: {reason}")

    def is_alive(self) -> bool:
        # Not reaped here: until then no other process or group can get its number, so kill() ends the right ones.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ask(self, request: Request, outcomes: list[Outcome], limit_s: float) -> int | None:
        """Appends the outcomes of the pairs that `outcomes` does not have yet.

        Returns 0 once all are there, the status with which the comparing copy ended before, and None if the process
        made no progress or died. A pair without a verdict (out of memory) counts as over the limit.
        """
        assert self._process.stdin is not None
        while self._receive(0.0):  # of a comparison that died while idle
            pass
        self._request += 1
        message = json.dumps([self._request, request.texts, request.pairs[len(outcomes) :], limit_s]).encode() + b"\n"
        try:
            _write_all(self._process.stdin.fileno(), message)
        except BrokenPipeError:
            return None
        patience_s = limit_s * STALL_FACTOR + OVERTIME_S
        while len(outcomes) < len(request.pairs):
            reply = self._receive(time.monotonic() + patience_s)
            if reply is None:
                return None
            if "error" in reply:
                self._fail(reply)
            if reply["request"] == self._request:
                outcomes += [_OUTCOMES[letter] for letter in reply["verdicts"]]
            if "died" in reply:
                return int(reply["died"])
        return 0

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next line from the process, if it is there or comes before the deadline (of the monotonic clock)."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready = select.poll()  # unlike select(), good for descriptors beyond 1023
        ready.register(descriptor, select.POLLIN)
        while b"\n" not in self._received:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            if not (chunk := os.read(descriptor, 65536)):
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        """End the process and what it forked: it leads a process group of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def _write_all(descriptor: int, message: bytes) -> None:
    while message:
        message = message[os.write(descriptor, message) :]
