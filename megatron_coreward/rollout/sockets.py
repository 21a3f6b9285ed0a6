"""Where the sockets of a run lie: the kernel takes paths of 107 bytes, and some temporary directories are long.

Ray's sockets are in a session of its own under the temporary directory, those of a tensor-parallel engine in a folder
of ours there. If TMPDIR is too long for one of them, /tmp is used for it; if that cannot be written, preflight refuses,
with the length that was found and those that are allowed.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

LONGEST = 107  # bytes of a socket's path (sun_path of Linux, without its end)
FALLBACK = Path("/tmp")

PREFIX = "coreward."  # of an engine's folder
IN_RAY = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
IN_ENGINE = len(f"/.{PREFIX}12345678/") + 36  # vLLM names its sockets by a UUID


def ray_folder() -> Path:
    """The temporary directory for Ray's session. Raises ValueError if none is short enough."""
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    return _short(Path(named) if named else FALLBACK, IN_RAY)


def engine_folder() -> Path:
    """The temporary directory for a tensor-parallel engine's folder. Raises ValueError if none is short enough."""
    return _short(Path(tempfile.gettempdir()), IN_ENGINE)


def engine_folders() -> set[Path]:
    """Where the folder of an engine may be that runs, or ran, on this host."""
    return {Path(tempfile.gettempdir()), FALLBACK}


def problems(tensor_parallel_engines: bool) -> Iterator[str]:
    """What is wrong with the temporary directory of this machine."""
    for find in (ray_folder, engine_folder) if tensor_parallel_engines else (ray_folder,):
        try:
            find()
        except ValueError as error:
            yield str(error)


def _short(folder: Path, inside: int) -> Path:
    if _fits(folder, inside):
        return folder
    if os.access(FALLBACK, os.W_OK | os.X_OK):
        return FALLBACK
    raise ValueError(
        f"TMPDIR: {folder} has {len(os.fsencode(folder))} bytes, and {FALLBACK} cannot be written instead; allowed: up "
        f"to {LONGEST - IN_RAY} for Ray's sockets, up to {LONGEST - IN_ENGINE} for those of a tensor-parallel engine"
    )


def _fits(folder: Path, inside: int) -> bool:
    return len(os.fsencode(folder.absolute())) + inside <= LONGEST
