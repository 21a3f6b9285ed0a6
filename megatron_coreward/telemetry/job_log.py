"""An append-only file of finished work, so that a killed job continues after the last of it and repeats nothing.

The first line says what the work is (its identity); each further line is one finished item with its key.

Invariants, each held by a test: an item is on disk when `append` returns; a part of a line that a kill left is dropped
when the log is opened, as are items that were not finished; a log of other work is refused, never mixed with.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import fsync_directory

Item = dict[str, Any]


class JobLog:
    """The items of one job. `identity` is plain JSON: everything that decides what the items are."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens the log or starts it.

        Raises InputError if the file is a log of other work, naming what differs, is no log, or is open in
        another process.
        """
        self._path = path
        self._items: dict[str, Item] = {}
        wanted = json.loads(json.dumps(identity))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{path}: another process is writing it; choose another folder or wait") from None
            whole = self._read(wanted)
            os.ftruncate(self._descriptor, whole)
            if whole == 0:
                self._write([{"identity": wanted}])
                fsync_directory(path.parent)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __getitem__(self, key: str) -> Item:
        return self._items[key]

    def __len__(self) -> int:
        return len(self._items)

    def append(self, items: Mapping[str, Item]) -> None:
        """Adds finished items by key. Raises ValueError for a key that is there already."""
        if again := [key for key in items if key in self._items]:
            raise ValueError(f"{self._path} has {again[0]!r} already")
        self._write([{"key": key, "item": item} for key, item in items.items()])
        self._items.update(items)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "JobLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, wanted: Any) -> int:
        """Takes over the finished items; returns the length of the whole lines in bytes."""
        *lines, _part = self._path.read_bytes().split(b"\n")
        if not lines:
            return 0
        try:
            head, *rows = [json.loads(line) for line in lines]
            found = head["identity"]
            self._items = {row["key"]: row["item"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self._path}: not a log of finished work ({error}); remove it to start again") from None
        if found != wanted:
            differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            differences = "; ".join(f"{key}: found {found.get(key)!r}, now {wanted.get(key)!r}" for key in differs)
            raise InputError(f"{self._path}: a log of other work ({differences}); choose another folder or remove it")
        return sum(len(line) + 1 for line in lines)

    def _write(self, rows: Sequence[Item]) -> None:
        data = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, data)
            if written != len(data):
                raise OSError(f"{self._path}: wrote {written} of {len(data)} bytes: is the disk full?")
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        os.fsync(self._descriptor)


def refuse_former_name(path: Path, former: Path) -> None:
    """Raises InputError if work would be repeated that a file under its former name has."""
    if former.exists() and not path.exists():
        raise InputError(f"{former}: this file is called {path.name} now; rename it to go on from it, or remove it")
