"""Symbolic comparison behind a hard time limit: a small pool of killable processes.

Invariants: no call lasts longer than the time limit plus the start of a process; a comparison that runs over the limit
is killed, never waited for; a process starts when its first pair comes and is reused after that. Safe to call from
several threads: each call borrows one process.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_coreward.errors import RunError

WORKER_PROGRAM = Path(__file__).with_name("symbolic_worker.py")
# What a process needs to find its interpreter and packages: no tokens, no keys, nothing else of the parent's.
INHERITED = frozenset({"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})
OVERTIME_S = 2.0  # after a pair's limit, at which the kernel ends the comparison, until its process is given up, too
START_LIMIT_S = 120.0  # importing sympy takes half a second, much more on a crowded machine or a cold network disk


class SymbolicPool:
    def __init__(self, timeout_s: float, num_workers: int = 1) -> None:
        if timeout_s <= 0 or num_workers < 1:
            raise ValueError(f"need timeout_s > 0 and num_workers >= 1, got {timeout_s} and {num_workers}")
        self._timeout_s = timeout_s
        self._num_workers = num_workers
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a place whose process is not started
        for _ in range(num_workers):
            self._idle.put(None)

    def equivalent(self, a: str, b: str) -> bool | None:
        """math-verify's verdict on two LaTeX answers; None where it took longer than the limit or its process died.

        Raises RunError where no worker process can be started at all, for instance without math-verify.
        """
        worker, keep = self._idle.get(), False
        try:
            if worker and not worker.is_alive():
                worker.kill()
                worker = None
            worker = worker or _Worker()
            reply = worker.ask(a, b, self._timeout_s)
            keep = reply is not None
            return None if reply is None or "died" in reply else bool(reply["equivalent"])
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
        self._pair = 0
        self._received = b""
        # A fresh interpreter in a session of its own: no copied memory, no inherited file, no preloaded library and no
        # secret of the parent's, no Ctrl-C that is meant for the parent; -P keeps this folder off its module path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name in INHERITED},
        )
        greeting = self._receive(time.monotonic() + START_LIMIT_S) or {}
        if "ready" not in greeting:
            self.kill()
            reason = greeting.get("error", f"exit status {self._process.returncode} within {START_LIMIT_S:.0f} s")
            raise RunError(f"the process for symbolic comparison did not start: {reason}")

    def is_alive(self) -> bool:
        # Not reaped here: until then no other process or group can get its number, so kill() ends the right ones.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ask(self, a: str, b: str, limit_s: float) -> dict[str, Any] | None:
        """The reply to one pair, or that its comparison died; None where nothing came in time or the process died."""
        assert self._process.stdin is not None
        while self._receive(0.0):  # of a comparison that died while idle
            pass
        self._pair += 1
        try:
            self._process.stdin.write(json.dumps([self._pair, a, b, limit_s]).encode() + b"\n")
        except BrokenPipeError:
            return None
        deadline = time.monotonic() + limit_s + OVERTIME_S
        while reply := self._receive(deadline):
            if "died" in reply or reply["pair"] == self._pair:
                return reply
        return None

    def _receive(self, deadline: float) -> dict[str, Any] | None:
        """The next line from the process, if it is there or comes before the deadline (of the monotonic clock)."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready = select.poll()  # unlike select(), good for descriptors beyond 1023
        ready.register(descriptor, select.POLLIN)
        while b"\n" not in self._received:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            if not (chunk := os.read(descriptor, 4096)):
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
