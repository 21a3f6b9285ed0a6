"""A finished run leaves its page, and loses nothing if the page cannot be written."""

from pathlib import Path

import pytest

from megatron_coreward.config.schema import RunConfig
from megatron_coreward.trainer import finish
from tests.report.runs import write_run


def _config(run_dir: Path) -> RunConfig:
    return RunConfig.model_construct(run_dir=run_dir)


def test_the_page_stands_in_the_run_directory(tmp_path: Path) -> None:
    run_dir, told = write_run(tmp_path / "run"), []
    finish.try_report(_config(run_dir), told.append)
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert told == []


def test_an_error_is_told_with_the_command_that_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, told = write_run(tmp_path / "run"), []

    def full(path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "write_report", full)
    finish.try_report(_config(run_dir), told.append)
    assert told == [
        "report.html was not written: OSError: [Errno 28] No space left on device; "
        f"`megatron-coreward report {run_dir}` tries again"
    ]
