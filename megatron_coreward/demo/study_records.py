"""What is kept of the runs of a study: a small table each, of what the guard reads and what people look at.

<directory>/<name of the cell, with -- for />--seed-1.csv.gz: a line a step, four significant digits, an empty field if
the step has no such metric. Pictures, tables and the guard's tests are made from these alone.
"""

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.guard.indicators import METRICS
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.jsonl import FILE_NAME, Row, read_rows

ACCURACY = "val/avg@2"
# For people; the guard reads none of them.
SHOWN = (ACCURACY, "rollout/accuracy", "label/accuracy", "reward/accuracy", "reward/mean", "anchor/moved_share")
COLUMNS = (keys.STEP, *SHOWN, *METRICS)


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a study."""

    name: str  # of its cell
    seed: int
    rows: Sequence[Row]  # step 0, the validation before training, first

    def series(self, key: str) -> dict[int, float]:
        """Step -> value, for the steps that have the metric."""
        return {int(row[keys.STEP] or 0): value for row in self.rows if (value := row.get(key)) is not None}


def record_run(run_dir: Path, name: str, seed: int, directory: Path) -> Path:
    """Writes the table of a run. Returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name.replace('/', '--')}--seed-{seed}.csv.gz"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in read_rows(run_dir / FILE_NAME):
        writer.writerow({key: _short(value) for key, value in row.items() if value is not None})
    with replaced_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    return path


def read_records(directory: Path) -> list[Record]:
    """The tables of a directory, by name and seed."""
    return [_read(path) for path in sorted(directory.glob("*.csv.gz"))]


def by_name(records: Sequence[Record]) -> Mapping[str, list[Record]]:
    """The records of each cell, one a seed."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.name, []).append(record)
    return found


def _read(path: Path) -> Record:
    *parts, seed = path.name.removesuffix(".csv.gz").split("--")
    with gzip.open(path, "rt", newline="") as file:
        rows: list[Row] = [
            {key: float(value) for key, value in line.items() if value != ""} for line in csv.DictReader(file)
        ]
    return Record("/".join(parts), int(seed.removeprefix("seed-")), rows)


def _short(value: float) -> str:
    return f"{value:.4g}"
