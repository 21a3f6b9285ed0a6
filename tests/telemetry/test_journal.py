"""A journal keeps what was finished, drops what was not, and refuses other work."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.journal import Journal

IDENTITY = {"model": "m", "sampling": {"n": 2, "forms": ("boxed",)}}


def test_items_are_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.append({"a": {"x": 1}})
        journal.append({"b": {"x": "\ud800 \n"}})
        assert path.read_bytes().count(b"\n") == 3
    with Journal(path, IDENTITY) as journal:
        assert len(journal) == 2
        assert "a" in journal
        assert "c" not in journal
        assert journal["b"] == {"x": "\ud800 \n"}
        with pytest.raises(ValueError, match="'a' already"):
            journal.append({"a": {}})


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_part_of_a_line_is_dropped_and_can_be_written_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.append({"a": {"x": 1}})
        journal.append({"b": {"x": 2}})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, IDENTITY) as journal:
        assert "a" in journal
        assert "b" not in journal
        journal.append({"b": {"x": 2}})
    with Journal(path, IDENTITY) as journal:
        assert journal["b"] == {"x": 2}


def test_a_journal_that_was_cut_in_its_first_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"identity": {"mod')
    with Journal(path, IDENTITY) as journal:
        assert len(journal) == 0
    with Journal(path, IDENTITY):
        pass


def test_a_journal_of_other_work_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.append({"a": {}})
    before = path.read_bytes()
    with pytest.raises(InputError, match="model: found 'm', now 'other'"):
        Journal(path, IDENTITY | {"model": "other"})
    assert path.read_bytes() == before
    path.write_text("something else\n")
    with pytest.raises(InputError, match="not a journal"):
        Journal(path, IDENTITY)


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY), pytest.raises(InputError, match="another process"):
        Journal(path, IDENTITY)
    with Journal(path, IDENTITY):
        pass


@pytest.mark.timeout(60)
def test_a_writer_that_is_killed_leaves_whole_items_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    program = (
        "import itertools, pathlib, sys\n"
        "from megatron_coreward.telemetry.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), {})\n"
        "for i in itertools.count():\n"
        "    journal.append({str(i): {'text': 'x' * 10_000}})\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2]) as writer:
        deadline = time.monotonic() + 40
        while not path.exists() or path.stat().st_size < 200_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        writer.kill()
    with Journal(path, {}) as journal:
        assert len(journal) >= 10
        assert all(journal[str(i)] == {"text": "x" * 10_000} for i in range(len(journal)))
