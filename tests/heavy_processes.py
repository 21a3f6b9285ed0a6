"""Notices processes of Ray, engines and ranks among the descendants of this one, also those that end soon."""

import contextlib
import threading
from pathlib import Path
from typing import Self

import psutil

INTERVAL_S = 0.5  # Ray, an engine and a rank each take seconds to start
NAMES = {"raylet": "Ray", "gcs_server": "Ray", "multiprocessing.forkserver": "ranks"}  # in the command line
LIBRARIES = {"/vllm/": "an engine"}  # loaded


class HeavyProcesses:
    """A thread that looks at the descendants of this process while the context is open."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heavy processes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def take(self) -> set[str]:
        """What was seen since the last call."""
        seen, self._seen = self._seen, set()
        return seen

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_S):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    self._seen |= kinds_of(process)


def kinds_of(process: psutil.Process) -> set[str]:
    """What a process is of those named above."""
    command, maps = " ".join(process.cmdline()), Path(f"/proc/{process.pid}/maps").read_text()
    found = {kind for name, kind in NAMES.items() if name in command}
    return found | {kind for library, kind in LIBRARIES.items() if library in maps}
