"""What a worker process leaves for people: its output, and the stacks of its threads when a call took too long."""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessLog:
    """A file that takes the output of one worker after the other: those that are started again append to it."""

    path: Path  # on a file system that the worker's host has, too
    stacks_after_s: float  # a call that takes longer has the stacks of all threads written

    def open(self) -> None:
        """Leads the standard output and error of this process, and of those that it will start, into the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        os.write(2, f"--- process {os.getpid()} on {os.uname().nodename}, {now} UTC\n".encode())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around what should not take longer than `stacks_after_s`. It goes on: ending it is the driver's business."""
        faulthandler.dump_traceback_later(self.stacks_after_s, file=2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


class LoggedWorker:
    """A worker whose public methods are watched, and whose output is in its log."""

    UNWATCHED: frozenset[str] = frozenset()  # methods that may take as long as the process lives

    def __init__(self, log: ProcessLog | None) -> None:
        """Args:
        log: None: the output stays where it goes anyway.
        """
        self._log = log
        if log is not None:
            log.open()

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self._log is None else self._log.watching()

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name, method in list(vars(cls).items()):
            if callable(method) and not name.startswith("_") and name not in cls.UNWATCHED:
                setattr(cls, name, _watched(method))


def _watched(method: Any) -> Any:
    @wraps(method)
    def call(self: LoggedWorker, *args: Any, **kwargs: Any) -> Any:
        with self._watching():
            return method(self, *args, **kwargs)

    return call
