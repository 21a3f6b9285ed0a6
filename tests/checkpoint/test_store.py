"""Checkpoints appear whole or not at all, the newest is found, old ones go."""

from pathlib import Path

import pytest

from megatron_coreward.checkpoint.store import Position, checkpoint_path, load_checkpoint, save_checkpoint, saved_steps
from megatron_coreward.errors import InputError


def write(path: Path) -> None:
    (path / "shard").write_text("weights")


def test_what_is_saved_is_found_and_read_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(3, 6), write, keep=2)
    read: list[str] = []
    position = load_checkpoint(tmp_path, 3, lambda path: read.append((path / "shard").read_text()))
    assert (position, read) == (Position(3, 6), ["weights"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Position(step, step), write, keep=2)
    assert saved_steps(tmp_path) == [2, 3]


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        write(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, Position(1, 1), fail, keep=2)
    assert saved_steps(tmp_path) == []
    save_checkpoint(tmp_path, Position(1, 1), write, keep=2)  # what the failure left behind is in nobody's way
    assert saved_steps(tmp_path) == [1]


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Position(1, 1), write, keep=2)
    (checkpoint_path(tmp_path, 1) / "trainer.json").write_text("{")
    with pytest.raises(InputError, match="step_000001: damaged"):
        load_checkpoint(tmp_path, 1, write)
