"""metrics.jsonl: one flat JSON object a step, `step` and `step_time_s` always there.

Invariants, each held by a test:
- the file holds whole lines only: a row is one write, made durable before `write` returns, and a row that could not be
  written in full is removed; a part of a line that a killed process left is dropped on opening and never read;
- steps grow from line to line: opening for `first_step` drops the rows of that step and later ones, in one atomic swap;
- every line is JSON that any reader accepts: a metric that is NaN or infinite is written as null.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import append_line, fsync_directory, replaced_whole, writing

FILE_NAME = "metrics.jsonl"

Row = dict[str, float | None]

_REMEDY = "restore the file, or remove the line"


class JsonlSink:
    """Appends rows to a metrics file. `first_step` is the first step that will be written: 0 for a new run."""

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._last_step = _truncate(path, first_step)
            self._descriptor: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            fsync_directory(path.parent)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; it is on disk on return."""
        if self._descriptor is None:
            raise ValueError(f"{self._path} is closed")
        if keys.STEP_TIME not in metrics:
            raise ValueError(f"the metrics of step {step} lack {keys.STEP_TIME}")
        if metrics.get(keys.STEP, step) != step:
            raise ValueError(f"the metrics of step {step} say {keys.STEP}={metrics[keys.STEP]}")
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"{self._path}: step {step} comes after step {self._last_step}")
        row = {keys.STEP: step} | {key: _json_number(value) for key, value in metrics.items() if key != keys.STEP}
        with writing(self._path):
            append_line(self._descriptor, json.dumps(row, allow_nan=False).encode() + b"\n", self._path)
        self._last_step = step

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics file, in order; a part of a line at the end is not read.

    A run may be writing while this reads. Raises InputError if a whole line is not a row, naming the line.
    """
    return [_parse(path, number, line)[1] for number, line in enumerate(_whole_lines(path), start=1)]


def _truncate(path: Path, first_step: int) -> int | None:
    """Drops the rows of `first_step` and later, and a part of a line at the end. Returns the last step that stays."""
    if not path.exists():
        return None
    if first_step <= 0:  # nothing of it stays, whatever it holds
        with replaced_whole(path) as temporary:
            temporary.write_bytes(b"")
        return None
    steps_and_lines = [(_parse(path, number, line)[0], line) for number, line in enumerate(_whole_lines(path), start=1)]
    kept = [(step, line) for step, line in steps_and_lines if step < first_step]
    content = b"".join(line + b"\n" for _, line in kept)
    if len(content) != path.stat().st_size:
        with replaced_whole(path) as temporary:
            temporary.write_bytes(content)
    return max((step for step, _ in kept), default=None)


def _whole_lines(path: Path) -> list[bytes]:
    *lines, _part = path.read_bytes().split(b"\n")
    return lines


def _parse(path: Path, number: int, line: bytes) -> tuple[int, Row]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error}); {_REMEDY}") from error
    step = row.get(keys.STEP) if isinstance(row, dict) else None
    if not isinstance(step, int):
        raise InputError(f"{path}, line {number}: not a row of metrics with a whole number as {keys.STEP}; {_REMEDY}")
    return step, row


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
