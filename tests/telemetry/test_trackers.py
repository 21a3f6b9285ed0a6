"""A tracker may fail or hang in any phase: the run goes on, one note says so, and what it lacks can be brought."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_coreward.report.missed import bring_to_trackers, is_training
from megatron_coreward.telemetry.jsonl import FILE_NAME, JsonlSink, read_rows
from megatron_coreward.telemetry.sinks import SinkGroup, open_sinks
from megatron_coreward.telemetry.trackers import (
    GuardedTracker,
    Tracker,
    bring_missed,
    read_missed,
    within,
)

Phase = Literal["open", "log", "finish"]


@dataclass
class FakeTracker:
    """Stands for W&B: keeps the rows of every run that was finished or is open."""

    fails_in: Phase | None = None
    error: BaseException = field(default_factory=lambda: ConnectionError("no route to host"))
    hangs_s: float = 0.0
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    opened_at: list[int] = field(default_factory=list)
    finished: int = 0

    def tracker(self) -> Tracker:
        return Tracker("fake", self.open)

    def open(self, first_step: int) -> "FakeTracker":
        self._meet("open")
        self.opened_at.append(first_step)
        self.rows = {step: row for step, row in self.rows.items() if step < first_step}
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= 2:
            self._meet("log")
        assert step not in self.rows
        self.rows[step] = dict(metrics)

    def finish(self) -> None:
        self._meet("finish")
        self.finished += 1

    def _meet(self, phase: Phase) -> None:
        if self.fails_in == phase:
            time.sleep(self.hangs_s)
            raise self.error


def run(run_dir: Path, fake: FakeTracker, steps: range, limit_s: float = 5.0) -> list[str]:
    """An attempt that writes some steps; returns the notes for people."""
    notes: list[str] = []
    metrics_file = run_dir / FILE_NAME
    first = JsonlSink(metrics_file, steps.start)
    guarded = GuardedTracker(fake.tracker(), run_dir, metrics_file, steps.start, notes.append, limit_s)
    with SinkGroup([first, guarded]) as sinks:
        for step in steps:
            sinks.write(step, {"step_time_s": 1.0, "reward": step / 10})
    return notes


@pytest.mark.parametrize("phase", ["open", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no route\x1b[2J"), SystemExit(1), MemoryError()])
def test_a_tracker_that_fails_in_any_phase_is_reported_once_and_the_rows_are_kept(
    tmp_path: Path, phase: Phase, error: BaseException
) -> None:
    notes = run(tmp_path, FakeTracker(phase, error), range(5))
    assert [row["step"] for row in read_rows(tmp_path / FILE_NAME)] == [0, 1, 2, 3, 4]
    (line,) = notes
    assert line.startswith("fake failed when it was ")
    assert type(error).__name__ in line
    assert f"megatron-coreward report {tmp_path}" in line
    assert "\x1b" not in line
    assert read_missed(tmp_path) == {"fake": {"open": 0, "log": 2, "finish": 5}[phase]}


@pytest.mark.parametrize("phase", ["open", "log", "finish"])
def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path, phase: Phase) -> None:
    begin = time.monotonic()
    (line,) = run(tmp_path, FakeTracker(phase, hangs_s=30.0), range(5), limit_s=0.2)
    assert time.monotonic() - begin < 10
    assert "TimeoutError: no answer after 0.2 s" in line


def test_the_next_attempt_brings_what_was_missed(tmp_path: Path) -> None:
    fake = FakeTracker("log")
    assert len(run(tmp_path, fake, range(5))) == 1
    assert sorted(fake.rows) == [0, 1]
    fake.fails_in = None
    assert run(tmp_path, fake, range(4, 7)) == []
    assert fake.opened_at == [0, 2]
    assert sorted(fake.rows) == [0, 1, 2, 3, 4, 5, 6]
    assert fake.rows[3]["reward"] == 0.3
    assert read_missed(tmp_path) == {}


def test_after_the_run_it_can_be_brought_and_what_fails_again_is_kept_for_later(tmp_path: Path) -> None:
    fake, notes = FakeTracker("log"), list[str]()
    run(tmp_path, fake, range(5))
    assert bring_missed(tmp_path, tmp_path / FILE_NAME, [fake.tracker()], notes.append) == []
    assert len(notes) == 1
    assert read_missed(tmp_path) == {"fake": 2}
    fake.fails_in = None
    brought = bring_missed(tmp_path, tmp_path / FILE_NAME, [fake.tracker()], notes.append)
    assert brought == ["fake has the rows from step 2 on"]
    assert sorted(fake.rows) == [0, 1, 2, 3, 4]
    assert read_missed(tmp_path) == {}
    assert bring_missed(tmp_path, tmp_path / FILE_NAME, [fake.tracker()], notes.append) == []


def test_a_blocked_tensorboard_folder_ends_no_run_and_report_brings_the_rows(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    notes: list[str] = []
    with open_sinks(tmp_path, first_step=0, warn=notes.append) as sinks:
        for step in (0, 1, 2):
            sinks.write(step, {"step_time_s": 1.0, "reward/mean": step / 4})
    assert len(notes) == 1
    assert notes[0].startswith("tensorboard failed when it was opened")
    (tmp_path / "tensorboard").unlink()
    assert bring_to_trackers(tmp_path) == ["tensorboard has the rows from step 0 on"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert bring_to_trackers(tmp_path) == []


def test_a_full_disk_under_tensorboard_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    notes: list[str] = []
    with open_sinks(tmp_path, first_step=0, warn=notes.append) as sinks:
        sinks.write(0, {"step_time_s": 1.0})
        (events,) = (tmp_path / "tensorboard").iterdir()
        events.unlink()
        events.symlink_to("/dev/full")  # TensorBoard opens its file again for each write
        for step in (1, 2, 3):
            sinks.write(step, {"step_time_s": 1.0})
    assert [row["step"] for row in read_rows(tmp_path / FILE_NAME)] == [0, 1, 2, 3]
    assert len(notes) == 1
    assert "No space left on device" in notes[0]


def test_rows_are_not_brought_while_the_run_goes_on(tmp_path: Path) -> None:
    from megatron_coreward.trainer.run_directory import lock_run_directory

    run(tmp_path, FakeTracker("log"), range(5))
    with lock_run_directory(tmp_path):
        assert is_training(tmp_path)
        (line,) = bring_to_trackers(tmp_path)
        assert "once the run in" in line
    assert not is_training(tmp_path)


def test_a_damaged_note_of_what_was_missed_is_as_none(tmp_path: Path) -> None:
    for content in ("", "[]", "{", '{"fake": null}'):
        (tmp_path / "missed.json").write_text(content)
        assert read_missed(tmp_path) == {}


def test_a_call_returns_what_it_returns_and_raises_what_it_raises() -> None:
    assert within(5.0, lambda: threading.current_thread().name) == "tracker"
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
