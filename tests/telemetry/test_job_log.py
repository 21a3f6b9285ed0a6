"""A log keeps what was finished, drops what was not, and refuses other work."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.job_log import JobLog, refuse_former_name

IDENTITY = {"model": "m", "sampling": {"n": 2, "forms": ("boxed",)}}


def test_items_are_there_when_the_log_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    with JobLog(path, IDENTITY) as job_log:
        job_log.append({"a": {"x": 1}})
        job_log.append({"b": {"x": "\ud800 \n"}})
        assert path.read_bytes().count(b"\n") == 3
    with JobLog(path, IDENTITY) as job_log:
        assert len(job_log) == 2
        assert "a" in job_log
        assert "c" not in job_log
        assert job_log["b"] == {"x": "\ud800 \n"}
        with pytest.raises(ValueError, match="'a' already"):
            job_log.append({"a": {}})


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_part_of_a_line_is_dropped_and_can_be_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    with JobLog(path, IDENTITY) as job_log:
        job_log.append({"a": {"x": 1}})
        job_log.append({"b": {"x": 2}})
    path.write_bytes(path.read_bytes()[:-cut])
    with JobLog(path, IDENTITY) as job_log:
        assert "a" in job_log
        assert "b" not in job_log
        job_log.append({"b": {"x": 2}})
    with JobLog(path, IDENTITY) as job_log:
        assert job_log["b"] == {"x": 2}


def test_a_log_that_was_cut_in_its_first_line_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"identity": {"mod')
    with JobLog(path, IDENTITY) as job_log:
        assert len(job_log) == 0
    with JobLog(path, IDENTITY):
        pass


def test_a_log_of_other_work_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JobLog(path, IDENTITY) as job_log:
        job_log.append({"a": {}})
    before = path.read_bytes()
    with pytest.raises(InputError, match="model: found 'm', now 'other'"):
        JobLog(path, IDENTITY | {"model": "other"})
    assert path.read_bytes() == before
    path.write_text("something else\n")
    with pytest.raises(InputError, match="not a log of finished work"):
        JobLog(path, IDENTITY)


def test_a_log_under_its_former_name_is_refused_with_the_new_one(tmp_path: Path) -> None:
    former, path = tmp_path / "journal.jsonl", tmp_path / "samples.jsonl"
    refuse_former_name(path, former)
    former.touch()
    with pytest.raises(InputError, match=r"journal.jsonl: this file is called samples.jsonl now; rename it"):
        refuse_former_name(path, former)
    path.touch()
    refuse_former_name(path, former)


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JobLog(path, IDENTITY), pytest.raises(InputError, match="another process"):
        JobLog(path, IDENTITY)
    with JobLog(path, IDENTITY):
        pass


@pytest.mark.timeout(60)
def test_a_writer_that_is_killed_leaves_whole_items_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    program = (
        "import itertools, pathlib, sys\n"
        "from megatron_coreward.telemetry.job_log import JobLog, refuse_former_name\n"
        "log = JobLog(pathlib.Path(sys.argv[1]), {})\n"
        "for i in itertools.count():\n"
        "    log.append({str(i): {'text': 'x' * 10_000}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2]) as writer:
        deadline = time.monotonic() + 40
        while not path.exists() or path.stat().st_size < 200_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        writer.kill()
    with JobLog(path, {}) as job_log:
        assert len(job_log) >= 10
        assert all(job_log[str(i)] == {"text": "x" * 10_000} for i in range(len(job_log)))
