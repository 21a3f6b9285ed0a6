"""Files that appear whole or not at all, and stay after a power cut."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_coreward.errors import RunError, environment_problem


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the machine says against writing a file is a RunError that names the file and what helps."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {environment_problem(error, path)}") from error


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes the name `path` when the block succeeds.

    A reader sees the old file or the new one, never a part. When the block fails, `path` is as it was and nothing is
    left beside it. The temporary name starts with a dot: no pattern for finished files finds it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(descriptor: int, line: bytes, path: Path) -> None:
    """Writes a whole line at the end of a file and makes it durable, or leaves the file as it was.

    Raises:
        OSError: it cannot be written whole.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: wrote {written} of {len(line)} bytes of a line: is the disk full?")
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    os.fsync(descriptor)
