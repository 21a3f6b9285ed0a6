"""What the machine says against a file is one line for people: which file, what is wrong, what helps."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward import cli
from megatron_coreward.commands import train
from megatron_coreward.errors import RunError, environment_problem
from megatron_coreward.telemetry.files import replaced_whole, writing


@pytest.mark.parametrize(
    ("number", "helps"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EISDIR, "move it away"),
        (errno.ENOTDIR, "move it away"),
        (errno.ESTALE, "removed meanwhile"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_an_error_of_the_machine_names_the_file_and_what_helps(number: int, helps: str) -> None:
    line = environment_problem(OSError(number, os.strerror(number), "/data/run"))
    assert line.startswith(f"/data/run: {os.strerror(number)}; ")
    assert helps in line


def test_what_is_written_is_named_and_not_its_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(RunError) as caught, writing(path), replaced_whole(path) as temporary:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    assert str(caught.value).startswith(f"cannot write {path}: No space left on device; make room")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match=f"cannot write {path}: Input/output error"), writing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_error_of_the_machine_that_nobody_expected_is_reported_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(options: object) -> None:
        error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/run/x\x1b[2J")
        error.add_note("the same command goes on after step 4")
        raise error

    monkeypatch.setattr(train, "_train", end)
    assert cli.main(["train", "recipe.yaml"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed == (
        "the run failed: /data/run/x\\x1b[2J: Read-only file system; make it writable for this user, or choose another "
        "place; the same command goes on after step 4\n"
    )


def test_who_stops_reading_gets_no_traceback() -> None:
    command = f"{sys.executable} -m megatron_coreward plan --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
