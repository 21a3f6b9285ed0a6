"""Symbolic comparison behind a hard time limit: a small pool of killable processes.

Invariants: no call lasts longer than the time limit plus the start of a process; a process that runs over the limit or
dies is killed and replaced, never waited for; a process starts when its first pair comes and is reused after that.
Safe to call from several threads: each call borrows one process.
"""

import json
import os
import queue
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_coreward.errors import RunError

WORKER_PROGRAM = Path(__file__).with_name("symbolic_worker.py")
# What a process needs to find its interpreter and packages: no tokens, no keys, nothing else of the parent's.
INHERITED = frozenset({"HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"})
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
            if worker is None or not worker.is_alive():
                worker = _Worker()
            reply = worker.ask(a, b, self._timeout_s)
            keep = reply is not None and not reply["retire"]
            return None if reply is None else bool(reply["equivalent"])
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
    """One comparison process and the pipes to it."""

    def __init__(self) -> None:
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
        greeting = self._receive(START_LIMIT_S) or {}
        if "ready" not in greeting:
            self.kill()
            reason = greeting.get("error", f"exit status {self._process.returncode} within {START_LIMIT_S:.0f} s")
            raise RunError(f"the process for symbolic comparison did not start: {reason}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, a: str, b: str, limit_s: float) -> dict[str, Any] | None:
        """The reply to one pair; None where it did not come in time or the process died."""
        assert self._process.stdin is not None
        try:
            # The process's own alarm is the second line: it matters when this parent is gone.
            self._process.stdin.write(json.dumps([a, b, limit_s + 1.0]).encode() + b"\n")
        except BrokenPipeError:
            return None
        return self._receive(limit_s)

    def _receive(self, limit_s: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        descriptor, deadline, line = self._process.stdout.fileno(), time.monotonic() + limit_s, b""
        ready = select.poll()  # unlike select(), good for descriptors beyond 1023
        ready.register(descriptor, select.POLLIN)
        while not line.endswith(b"\n"):
            left_ms = (deadline - time.monotonic()) * 1000
            if left_ms <= 0 or not ready.poll(left_ms):
                return None
            if not (chunk := os.read(descriptor, 4096)):
                return None
            line += chunk
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
