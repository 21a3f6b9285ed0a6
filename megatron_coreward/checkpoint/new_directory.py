"""A directory that appears whole or not at all."""

import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_coreward.errors import InputError, RunError

FREE_MARGIN = 64 * 2**20  # bytes for what lies beside weights, and for the file system


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """A directory that is on the disk and gets its name when it is complete; it is removed if anything goes wrong
    before, SIGTERM and Ctrl-C included.

    Raises:
        InputError: the target exists, or its parent does not.
        RunError: the disk has less than `nbytes` left, or runs full.
    """
    if os.path.lexists(target):
        raise InputError(f"{target} exists; choose another target, or remove it first")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is no directory, so {target.name} cannot be made in it")
    hidden = f".{target.name}.partial-"
    free = shutil.disk_usage(parent).free
    if free < nbytes + FREE_MARGIN:
        others = sorted(path.name for path in parent.iterdir() if path.name.startswith(hidden))
        hint = f"; {', '.join(others)} may be left of a conversion that was killed" if others else ""
        raise RunError(f"{target} needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {parent}{hint}")
    partial = parent / f"{hidden}{secrets.token_hex(4)}"
    with _interruptible_once():
        try:
            partial.mkdir()
            yield partial
            fsync_tree(partial)
            if os.path.lexists(target):  # an empty directory would be replaced
                raise InputError(f"{target} has appeared in the meantime; choose another target")
            os.rename(partial, target)
            _sync_entry(parent)
        except OSError as e:
            raise RunError(f"{target} could not be written: {e.strerror} ({e.filename or parent})") from e
        finally:
            _ignore_signals()
            shutil.rmtree(partial, ignore_errors=True)  # by now it has another name, or something went wrong


@contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """A half-written directory goes when its writer fails, and a full disk is an OSError that names it.

    safetensors (0.8) says it as an error of its own, with the system's number in its text.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(partial)) from error
        raise


def fsync_tree(folder: Path) -> None:
    """Returns when all files in a directory are on the disk, so that no crash leaves empty ones under a final name."""
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _interruptible_once() -> Iterator[None]:
    """SIGTERM and SIGINT end the block with KeyboardInterrupt; after that, or `_ignore_signals`, no more do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
