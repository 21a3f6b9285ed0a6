"""Mailboxes: memory of a host through which messages pass from ranks to workers, two buckets at a time.

A mailbox is a file in /dev/shm, mapped by all who use it: counters, and two slots for the messages of a bucket. Each
rank counts the buckets that it has put there, each worker those that it has taken: so a rank knows when a slot is free,
and a worker when all is there. Over CUDA IPC the messages lie in memory of a GPU, and only the counters here.

Plain files and mmap, not `multiprocessing.shared_memory`: under Python 3.11 its resource tracker unlinks a segment as
soon as any process that merely attached to it exits (bpo-38119; `track=False` came with 3.13).

The creator keeps a lock on the file for as long as it lives, and the kernel drops it even after SIGKILL. So a file
without a lock is an orphan: it is replaced by a new mailbox of its name, and removed when any mailbox is created.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.errors import RunError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "megatron_coreward."
MAGIC = b"coreward"
NUM_SLOTS = 2
_COUNTERS = 64  # byte of the first counter
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class MailboxLayout:
    """What a mailbox looks like; the same for all who use it."""

    name: str
    slot_bytes: int  # of the largest bucket's messages
    num_ranks: int
    num_workers: int  # that take the same messages: one of each engine

    @property
    def header_bytes(self) -> int:
        """Whole pages."""
        return -(-(_COUNTERS + 8 * (self.num_ranks + self.num_workers)) // _PAGE) * _PAGE

    @property
    def nbytes(self) -> int:
        return self.header_bytes + NUM_SLOTS * self.slot_bytes

    @property
    def digest(self) -> bytes:
        """32 bytes that two parties share exactly if they mean the same layout."""
        return hashlib.sha256(repr(self).encode()).digest()


def mailbox_path(name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"mailbox name {name!r}; allowed: a file name without '/' that does not start with '.'")
    return SHARED_MEMORY / f"{PREFIX}{name}"


class Mailbox:
    """A mailbox that this process has mapped."""

    def __init__(self, layout: MailboxLayout, memory: mmap.mmap) -> None:
        self.layout, self.memory = layout, memory

    def slot_start(self, number: int) -> int:
        """The byte at which the messages of the bucket with that number, counted over all weight syncs, start."""
        return self.layout.header_bytes + number % NUM_SLOTS * self.layout.slot_bytes

    def written(self, rank: int) -> int:
        """Buckets that a rank has put in."""
        return self._counter(rank)

    def taken(self, worker: int) -> int:
        """Buckets that a worker has taken out."""
        return self._counter(self.layout.num_ranks + worker)

    def has_written(self, rank: int, count: int) -> None:
        struct.pack_into("<q", self.memory, _COUNTERS + 8 * rank, count)

    def has_taken(self, worker: int, count: int) -> None:
        struct.pack_into("<q", self.memory, _COUNTERS + 8 * (self.layout.num_ranks + worker), count)

    def _counter(self, number: int) -> int:
        count: int = struct.unpack_from("<q", self.memory, _COUNTERS + 8 * number)[0]
        return count


class OwnedMailbox(Mailbox):
    """A mailbox that this process has created; it appears under its name whole, or not at all."""

    def __init__(self, layout: MailboxLayout) -> None:
        """Raises RunError if a living process owns a mailbox of this name, or /dev/shm has too little room."""
        self._path = mailbox_path(layout.name)
        remove_orphans()
        if self._path.exists():
            raise RunError(f"mailbox {layout.name!r} belongs to a process that is still running")
        partial = SHARED_MEMORY / f".{PREFIX}{layout.name}.{os.getpid()}"
        self._file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                # Takes the pages now: a full /dev/shm would otherwise end the process with SIGBUS at a later write.
                os.posix_fallocate(self._file, 0, layout.nbytes)
            except OSError as error:
                free = shutil.disk_usage(SHARED_MEMORY).free
                raise RunError(
                    f"mailbox {layout.name!r} needs {layout.nbytes} bytes in {SHARED_MEMORY}, {free} are "
                    f"free: set a smaller sync.bucket_mib ({error})"
                ) from error
            super().__init__(layout, mmap.mmap(self._file, layout.nbytes))
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


def open_mailbox(layout: MailboxLayout) -> Mailbox:
    """Maps the mailbox that another process has created.

    Raises:
        RunError: there is none, or it was made for other layouts or another bucket size.
    """
    path = mailbox_path(layout.name)
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        raise RunError(f"mailbox {layout.name!r} does not exist: rank 0 creates it") from None
    try:
        found = os.fstat(file).st_size
        if found != layout.nbytes:
            raise RunError(f"mailbox {layout.name!r} has {found} bytes, expected {layout.nbytes}")
        memory = mmap.mmap(file, found)
    finally:
        os.close(file)
    if memory[: len(MAGIC) + 32] != MAGIC + layout.digest:
        raise RunError(f"mailbox {layout.name!r} was made for other layouts or another bucket size")
    return Mailbox(layout, memory)


def remove_orphans() -> None:
    """Removes the mailboxes of processes that are gone."""
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
