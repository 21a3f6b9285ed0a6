"""A named piece of memory that processes of one host share: a file in /dev/shm, mapped.

Plain files and mmap, not `multiprocessing.shared_memory`: under Python 3.11 its resource tracker unlinks a segment as
soon as any process that merely attached to it exits (bpo-38119; `track=False` came with 3.13).

The creator keeps a lock on the file for as long as it lives, and the kernel drops it even after SIGKILL. So a file
without a lock is a leftover: it is replaced by a new segment of its name, and removed when any segment is created.
"""

import contextlib
import fcntl
import mmap
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import SegmentLayout, TensorMeta

if TYPE_CHECKING:
    import torch

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "megatron_coreward."
MAGIC = b"coreward"


def segment_path(name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"segment name {name!r}; allowed: a file name without '/' that does not start with '.'")
    return SHARED_MEMORY / f"{PREFIX}{name}"


class OwnedSegment:
    """A segment that this process has created; it appears under its name whole, or not at all."""

    def __init__(self, layout: SegmentLayout) -> None:
        """Raises RunError where a living process owns a segment of this name, or /dev/shm has too little room."""
        self._path = segment_path(layout.segment)
        remove_orphans()
        if self._path.exists():
            raise RunError(f"shared segment {layout.segment!r} belongs to a process that is still running")
        partial = SHARED_MEMORY / f".{PREFIX}{layout.segment}.{os.getpid()}"
        self._file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                # Takes the pages now: a full /dev/shm would otherwise end the process with SIGBUS at a later write.
                os.posix_fallocate(self._file, 0, layout.nbytes)
            except OSError as error:
                free = shutil.disk_usage(SHARED_MEMORY).free
                raise RunError(
                    f"shared segment {layout.segment!r} needs {layout.nbytes} bytes in {SHARED_MEMORY}, {free} are "
                    f"free: set a smaller sync.bucket_mib ({error})"
                ) from error
            self.memory = mmap.mmap(self._file, layout.nbytes)
            self.memory[: len(MAGIC)] = MAGIC
            self.memory[len(MAGIC) : len(MAGIC) + 32] = layout.digest
            os.rename(partial, self._path)
        except BaseException:
            os.close(self._file)
            partial.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Takes the name away; the memory goes when the last process that has mapped it lets go. May be repeated."""
        if self._file < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                self._path.unlink()
        os.close(self._file)
        self._file = -1


def open_segment(layout: SegmentLayout, *, writable: bool) -> mmap.mmap:
    """Maps the segment that another process has created.

    Raises:
        RunError: there is none, or it was made for another set of tensors or another bucket size.
    """
    path = segment_path(layout.segment)
    try:
        file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    except FileNotFoundError:
        raise RunError(f"shared segment {layout.segment!r} does not exist: rank 0 creates it") from None
    try:
        found = os.fstat(file).st_size
        if found != layout.nbytes:
            raise RunError(f"shared segment {layout.segment!r} has {found} bytes, expected {layout.nbytes}")
        memory = mmap.mmap(file, found, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    finally:
        os.close(file)
    if memory[: len(MAGIC) + 32] != MAGIC + layout.digest:
        raise RunError(f"shared segment {layout.segment!r} was made for other tensors or another bucket size")
    return memory


def remove_orphans() -> None:
    """Removes the segments of processes that are gone."""
    for path in SHARED_MEMORY.glob(f"{PREFIX}*"):
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:  # removed meanwhile, or another user's
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # its creator lives
        finally:
            os.close(file)


def tensor_at(memory: object, offset: int, meta: TensorMeta) -> "torch.Tensor":
    """The tensor that starts at a byte of a mapping or of any other buffer: a view, no copy."""
    import torch

    count = torch.Size(meta.shape).numel()
    return torch.frombuffer(memory, dtype=getattr(torch, meta.dtype), count=count, offset=offset).view(meta.shape)
