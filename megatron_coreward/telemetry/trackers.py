"""Trackers: where people watch a run. None is ever worth a run.

A tracker is opened, takes rows and is closed, and may fail or hang in each of them: a server is away, a disk is full, a
folder is blocked, a package is broken. Then people are notified once, the tracker is left alone for the rest of the
attempt, and RUN/missed.json notes the first step that it lacks. `metrics.jsonl` has every row, so what was missed is
brought when the tracker is opened next: by the next attempt, or by `megatron-coreward report RUN` (`bring_missed`).

Invariants (tests/telemetry/test_trackers.py): no error of a tracker leaves this module, whatever it is; no call of one
takes longer than its limit; what is brought later is every row from the first missed one on, once.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.jsonl import Row, read_rows
from megatron_coreward.telemetry.untrusted_text import excerpt

MISSED = "missed.json"  # in the run directory: tracker -> the first step that it lacks
LIMIT_S = 60.0  # of a call


class OpenTracker(Protocol):
    """What stores or shows rows of metrics elsewhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores one row. Steps grow from call to call."""

    def finish(self) -> None:
        """Stores what is still held back, and lets go of files and connections."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker that is not open yet."""

    name: str
    open: Callable[[int], OpenTracker]  # given the first step that will be logged: rows from there on are replaced


class GuardedTracker:
    """A tracker as a sink of a run: nothing that it does can end the run or hold it up."""

    def __init__(
        self,
        tracker: Tracker,
        run_dir: Path,
        metrics_file: Path,
        first_step: int,
        warn: Callable[[str], None] = lambda text: None,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Opens the tracker, and adds what it missed in earlier attempts.

        Args:
            metrics_file: the rows of the run.
            first_step: the first step that will be written.
            warn: takes the one line for people when the tracker fails.
            limit_s: seconds that a call may take.
        """
        self._tracker, self._run_dir, self._warn, self._limit_s = tracker, run_dir, warn, limit_s
        self._open: OpenTracker | None = None
        self._failed = False
        self._last = first_step - 1  # the last step that it was given, or need not be
        missed = read_missed(run_dir).get(tracker.name)
        begin = first_step if missed is None else min(missed, first_step)
        earlier = [row for row in _rows(metrics_file) if begin <= _step(row) < first_step] if missed is not None else []
        self._first_lacking = begin
        self._open = self._call("opened", lambda: tracker.open(begin))
        for row in earlier:
            self.write(_step(row), _numbers(row))

    @property
    def failed(self) -> bool:
        return self._failed

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a row, unless the tracker has failed."""
        opened = self._open
        if opened is not None:
            self._call(f"given step {step}", lambda: opened.log(step, metrics))
            if not self._failed:
                self._last, self._first_lacking = step, step + 1

    def close(self) -> None:
        """Finishes the tracker. A second call does nothing."""
        opened, self._open = self._open, None
        if opened is not None:
            self._call("finished", opened.finish)
            if not self._failed:
                note_missed(self._run_dir, self._tracker.name, None)

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return within(self._limit_s, call)
        except Exception as error:
            self._failed, self._open = True, None
            note_missed(self._run_dir, self._tracker.name, self._first_lacking)
            reason = f"{type(error).__name__}: {excerpt(str(error))[1:-1]}"
            self._warn(
                f"{self._tracker.name} failed when it was {what} ({reason}); "
                f"the run goes on without it, and `megatron-coreward report {self._run_dir}` adds what it lacks from "
                f"step {max(self._first_lacking, 0)} on"
            )
            return None


def within(limit_s: float, call: Callable[[], Any]) -> Any:
    """What a call returns. Anything that it raises, and a call that takes too long, is an Exception here.

    It runs on a thread of its own, which is left behind if it hangs and ends with the process.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # also SystemExit, by which some packages end a process
            errors.append(error)

    thread = threading.Thread(target=run, name="tracker", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        if isinstance(errors[0], Exception):
            raise errors[0]
        raise RuntimeError(f"{type(errors[0]).__name__}: {errors[0]}")
    if not results:
        raise TimeoutError(f"no answer after {limit_s:g} s")
    return results[0]


def read_missed(run_dir: Path) -> dict[str, int]:
    """Which trackers lack rows, and from which step on. Empty if the note is missing or damaged."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        return {str(name): int(step) for name, step in json.loads((run_dir / MISSED).read_text()).items()}
    return {}


def note_missed(run_dir: Path, name: str, first_step: int | None) -> None:
    """Notes that a tracker lacks rows from a step on, or (None) nothing any more."""
    missed = read_missed(run_dir)
    known = missed.pop(name, None)
    if first_step is not None:
        missed[name] = first_step if known is None else min(first_step, known)
    elif known is None:
        return
    with suppress(OSError):  # a full disk, say: then it is only the warning that says so
        if missed:
            with replaced_whole(run_dir / MISSED) as temporary:
                temporary.write_text(json.dumps(missed) + "\n")
        else:
            (run_dir / MISSED).unlink(missing_ok=True)


def bring_missed(
    run_dir: Path, metrics_file: Path, trackers: Sequence[Tracker], warn: Callable[[str], None]
) -> list[str]:
    """Gives trackers the rows that they lack, after the run. Returns what was brought, a line each."""
    missed, notes = read_missed(run_dir), []
    rows = _rows(metrics_file)
    for tracker in trackers:
        if tracker.name in missed and rows:
            after = _step(rows[-1]) + 1
            guarded = GuardedTracker(tracker, run_dir, metrics_file, after, warn)
            guarded.close()
            if not guarded.failed:
                notes.append(f"{tracker.name} has the rows from step {max(missed[tracker.name], 0)} on")
    return notes


def _rows(metrics_file: Path) -> list[Row]:
    return read_rows(metrics_file) if metrics_file.is_file() else []


def _step(row: Row) -> int:
    return int(row[keys.STEP] or 0)


def _numbers(row: Row) -> dict[str, float]:
    return {key: float("nan") if value is None else value for key, value in row.items() if key != keys.STEP}
