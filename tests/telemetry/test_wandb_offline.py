"""Weights & Biases itself, in its offline mode: what the package writes for a run, read back from its file.

The file is a log of protobuf records in LevelDB's format: blocks of 32 KiB, chunks with a header of seven bytes
(checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last), behind a header of seven bytes of the file.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.telemetry.sinks import open_sinks
from megatron_coreward.telemetry.trackers import read_missed

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")

pytestmark = [pytest.mark.timeout(200)]
CONFIG = {"seed": 3, "actor": {"lr": 1e-5}, "telemetry": {"wandb_project": "offline-test"}}


def records(file: Path) -> Iterator[Any]:
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def whole_record(file: Path) -> list[Any]:
    """The records of a run that has ended; the package's own process may write on for a moment."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        read = list(records(file))
        if any(record.WhichOneof("record_type") == "exit" for record in read):
            return read
        time.sleep(0.1)
    pytest.fail(f"{file} has no end after 60 s")


def items_of(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.long
def test_an_offline_run_holds_every_row_and_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir, warnings = tmp_path / "first-try", list[str]()
    attempts = [(0, 2), (2, 4)]  # the second attempt resumes
    for first, end in attempts:
        with open_sinks(run_dir, first_step=first, config=CONFIG, warn=warnings.append) as sinks:
            for step in range(first, end):
                sinks.write(step, {"step_time_s": 1.0, "reward/mean": step / 4})
    assert warnings == []
    assert read_missed(run_dir) == {}

    name = (run_dir / "wandb_id").read_text().strip()
    files = sorted(run_dir.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    read = [whole_record(file) for file in files]
    assert len(read) == len(attempts)
    rows = [items_of(r.history.item) for written in read for r in written if r.WhichOneof("record_type") == "history"]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    for written in read:
        (run,) = [r.run for r in written if r.WhichOneof("record_type") == "run"]
        assert (run.project, run.run_id, run.display_name) == ("offline-test", name, "first-try")
        assert {update.key: json.loads(update.value_json) for update in run.config.update}["actor"] == {"lr": 1e-5}
