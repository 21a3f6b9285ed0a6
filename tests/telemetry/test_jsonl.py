import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_coreward.errors import InputError, RunError
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.jsonl import JsonlSink, read_rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write_steps(path: Path, steps: range, first_step: int = 0) -> None:
    sink = JsonlSink(path, first_step)
    for step in steps:
        sink.write(step, {"step_time_s": 1.0, "reward/mean": step / 10})
    sink.close()


def test_a_row_is_one_flat_object_on_one_line_and_there_at_once(path: Path) -> None:
    sink = JsonlSink(path)
    sink.write(1, {"reward/mean": 0.5, "step_time_s": 2.5})
    assert path.read_text() == '{"step": 1, "reward/mean": 0.5, "step_time_s": 2.5}\n'
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(2, {"step_time_s": 1.0})


def test_a_row_without_its_time_is_refused(path: Path) -> None:
    sink = JsonlSink(path)
    with pytest.raises(ValueError, match="step 1 lack step_time_s"):
        sink.write(1, {"reward/mean": 0.5})
    sink.close()
    assert read_rows(path) == []


def test_a_row_that_names_another_step_is_refused(path: Path) -> None:
    sink = JsonlSink(path)
    sink.write(1, {"step": 1, "step_time_s": 1.0})
    with pytest.raises(ValueError, match="step 2 say step=3"):
        sink.write(2, {"step": 3, "step_time_s": 1.0})
    sink.close()


@pytest.mark.parametrize("step", [3, 2])
def test_steps_only_grow_within_a_process_and_over_a_restart(path: Path, step: int) -> None:
    write_steps(path, range(1, 4))
    sink = JsonlSink(path, first_step=10)
    with pytest.raises(ValueError, match=f"step {step} comes after step 3"):
        sink.write(step, {"step_time_s": 1.0})
    sink.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_cannot_say_is_null(path: Path, value: float) -> None:
    sink = JsonlSink(path)
    sink.write(1, {"step_time_s": 1.0, "loss/policy": value})
    sink.close()
    assert read_rows(path) == [{"step": 1, "step_time_s": 1.0, "loss/policy": None}]
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_resuming_drops_the_rows_that_will_be_written_again(path: Path) -> None:
    write_steps(path, range(9))
    write_steps(path, range(6, 8), first_step=6)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_resuming_after_the_last_row_leaves_the_file_alone(path: Path) -> None:
    write_steps(path, range(3))
    before = path.stat().st_ino
    JsonlSink(path, first_step=3).close()
    assert path.stat().st_ino == before
    assert len(read_rows(path)) == 3


def test_a_new_run_in_the_same_place_starts_an_empty_file(path: Path) -> None:
    write_steps(path, range(3))
    JsonlSink(path).close()
    assert path.read_bytes() == b""


def test_a_failed_truncation_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(path, range(4))
    before = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match="cannot write .*metrics.jsonl: power cut"):
        JsonlSink(path, first_step=2)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


@settings(max_examples=25)
@given(cut=st.integers(0, 200))
def test_wherever_a_writer_was_killed_only_whole_rows_are_read_and_kept(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write_steps(path, range(5))
    content = path.read_bytes()[:cut]
    path.write_bytes(content)
    whole = content.count(b"\n")
    assert [row["step"] for row in read_rows(path)] == list(range(whole))
    write_steps(path, range(whole, 6), first_step=whole)
    assert [row["step"] for row in read_rows(path)] == list(range(6))


def test_a_row_that_does_not_fit_on_the_disk_is_taken_back(path: Path) -> None:
    """A file size limit stands for the full disk; it holds for a process of its own."""
    program = (
        "import sys; from pathlib import Path\n"
        "from megatron_coreward.telemetry.jsonl import JsonlSink\n"
        "sink = JsonlSink(Path(sys.argv[1]))\n"
        "for step in range(100): sink.write(step, {'step_time_s': 1.0})\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "bytes of a line: is the disk full?" in done.stderr
    content = path.read_bytes()
    assert content.endswith(b"\n")
    assert 900 < len(content) <= 1000
    assert [row["step"] for row in read_rows(path)] == list(range(content.count(b"\n")))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a row"),
        ('{"reward/mean": 1}', "not a row"),
        ('{"step": "1"}', "not a row"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(path: Path, line: str, reason: str) -> None:
    write_steps(path, range(2))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=rf"metrics.jsonl, line 3: {reason}"):
        read_rows(path)
    with pytest.raises(InputError, match="line 3"):
        JsonlSink(path, first_step=2)


def test_a_file_replaced_whole_is_the_old_one_until_the_end_and_after_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with replaced_whole(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"

    def write_half_a_file() -> None:
        with replaced_whole(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half_a_file()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("config.yaml", "new")]
