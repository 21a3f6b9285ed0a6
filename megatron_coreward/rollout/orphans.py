"""What vLLM leaves on a host when a tensor-parallel engine is killed, and its removal.

Such an engine has sockets in a temporary directory, and segments of shared memory under names of vLLM's and Python's
making. It lists them in a folder of its own, together with a lock that the kernel drops when the engine is gone,
however it went. What a folder without a lock lists is removed before the next such engine starts, and after a run that
has failed.
"""

import fcntl
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_coreward.rollout.sockets import PREFIX, engine_folder, engine_folders
from megatron_coreward.weights.mailbox import SHARED_MEMORY

_LOCK, _SEGMENTS = "lock", "segments"
_MAPPED = re.compile(rf"{SHARED_MEMORY}/((?:psm_|vllm_dist_)[^/\s]+)$", re.MULTILINE)


class EngineResources:
    """The folder of an engine in this process; vLLM's sockets go there, too."""

    def __init__(self) -> None:
        remove_orphans()
        staged = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=engine_folder()))
        self._lock = os.open(staged / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = staged.rename(staged.with_name(staged.name[1:]))  # others look at it from now on

    def note_segments(self) -> None:
        """Lists the segments that this process and its children have mapped."""
        here = psutil.Process()
        names: set[str] = set()
        for process in (here, *here.children(recursive=True)):
            with suppress(OSError):  # it has ended meanwhile
                names.update(_MAPPED.findall(Path(f"/proc/{process.pid}/maps").read_text()))
        (self.folder / _SEGMENTS).write_text("\n".join(sorted(names)))

    def close(self) -> None:
        """Removes all that is listed, once the engine has ended. May be repeated."""
        if self._lock >= 0:
            _remove(self.folder)
            os.close(self._lock)
            self._lock = -1


def remove_orphans() -> None:
    """Removes what engines of this user that are gone have left on this host."""
    for folder in (found for place in engine_folders() for found in place.glob(f"{PREFIX}*")):
        with suppress(OSError):  # removed meanwhile, or its engine lives
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for name in (folder / _SEGMENTS).read_text().split():
            (SHARED_MEMORY / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
