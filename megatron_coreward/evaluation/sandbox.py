"""Runs Python that a model wrote, in a process of its own that can do as little as the machine allows.

Always: no other process (threads are allowed), no signal to one, no socket, by a filter of system calls; an empty
folder, no environment; limits of time, memory and file sizes; killed with its group at the end. And, at the better of
two levels, which are found out once by trying (`best_isolation`):

namespaces   Linux namespaces without privileges, through util-linux' `unshare`: a network without a card, no other
             process in sight, every file system read-only, empty scratch folders in memory in place of /tmp, /run and
             /dev/shm, no capabilities.
limits       if namespaces are not allowed: the program can write wherever this user may. Use a container.

Under either level a program reads what this user can read. What it must not know (the expected results) is not sent to
it: it computes, and the caller compares.

Invariants (tests/evaluation/test_sandbox.py, with hostile programs): a call returns within its limit and a second;
nothing that the program started outlives it; its output is bounded; nothing outside its folder
changes (with namespaces).
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from megatron_coreward.errors import RunError

Isolation = Literal["namespaces", "limits"]
LEVELS: tuple[Isolation, ...] = ("namespaces", "limits")  # the better one first
Status = Literal["ok", "failed", "timeout"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
_GRACE_S = 0.5  # of starting the process, on top of the program's time


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. The defaults are LiveCodeBench's time for a test, and what its solutions need."""

    seconds: float = 6.0  # by the clock, and of each processor
    memory_bytes: int = 4 << 30  # address space of each process
    output_bytes: int = 16 << 20  # of what it prints, and of each file that it writes
    threads: int = 64  # of users that are not root


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, and what it printed on its standard output."""

    status: Status
    output: str


def run_python(
    program: str, stdin: str = "", limits: Limits | None = None, isolation: Isolation | None = None
) -> Outcome:
    """Runs a program as `python program.py < stdin`.

    Args:
        isolation: the level; None: the best that this machine has.
    """
    limits = limits or Limits()
    level = isolation or best_isolation()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="coreward-sandbox-"))
        source, given, printed = (stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(3))
        for file, text in ((source, program), (given, stdin)):
            file.write(text.encode("utf-8", "surrogatepass"))
            file.seek(0)
        child = subprocess.Popen(
            [*_prefix(level), sys.executable, "-I", str(_CHILD), level, str(source.fileno()), *_numbers(limits)],
            stdin=given,
            stdout=printed,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=(source.fileno(),),
            start_new_session=True,
        )
        try:
            returncode: int | None = child.wait(limits.seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        printed.seek(0)
        output = printed.read(limits.output_bytes).decode("utf-8", "replace")
    if returncode is None or returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Outcome("timeout", output)
    return Outcome("ok" if returncode == 0 else "failed", output)


@cache
def best_isolation() -> Isolation:
    """`namespaces` if a small program runs in them here, else `limits`. Raises RunError if not even those are there."""
    for level in LEVELS:
        if level == "namespaces" and shutil.which("unshare") is None:
            continue
        if run_python("print('here')", limits=Limits(seconds=20.0), isolation=level) == Outcome("ok", "here\n"):
            return level
    raise RunError(
        "this machine does not let a process filter its system calls, so code that a model wrote cannot be confined; "
        "allowed: Linux on x86_64 or aarch64"
    )


def _prefix(level: Isolation) -> list[str]:
    return ["unshare", *_UNSHARE, "--"] if level == "namespaces" else []


def _numbers(limits: Limits) -> list[str]:
    # Above what all threads can compute until the wall clock ends them: it is for the case that nobody watches them.
    processor_s = math.ceil((limits.seconds + _GRACE_S) * limits.threads) + 1
    return [str(processor_s), str(limits.memory_bytes), str(limits.output_bytes), str(limits.threads)]
