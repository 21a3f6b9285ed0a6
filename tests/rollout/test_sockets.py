"""Paths of sockets fit into what the kernel takes, however long TMPDIR is, or the run is refused with the lengths."""

import socket
import tempfile
import uuid
from pathlib import Path

import pytest

from megatron_coreward.rollout import sockets
from megatron_coreward.rollout.orphans import EngineResources, remove_orphans


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "x" / ("y" * 90)
    folder.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)  # Python asks the variable once
    return folder


def of_length(length: int) -> str:
    return "/" + "a" * (length - 1)


def test_the_longest_temporary_directory_for_each_kind() -> None:
    assert (sockets.LONGEST - sockets.IN_RAY, sockets.LONGEST - sockets.IN_ENGINE) == (39, 51)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_keeps_a_directory_that_is_short_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(other, raising=False)
    assert sockets.ray_folder() == Path("/tmp")
    monkeypatch.setenv(name, of_length(39))
    assert sockets.ray_folder() == Path(of_length(39))
    monkeypatch.setenv(name, of_length(40))
    assert sockets.ray_folder() == Path("/tmp")


def test_the_kernel_takes_the_longest_path_and_no_longer_one(tmp_path: Path) -> None:
    for over in (0, 1):
        path = str(tmp_path / "s")
        path += "s" * (sockets.LONGEST - len(path) + over)
        with socket.socket(socket.AF_UNIX) as one:
            if over:
                with pytest.raises(OSError, match="too long"):
                    one.bind(path)
            else:
                one.bind(path)


def test_an_engine_under_a_long_tmpdir_has_a_short_folder_in_which_sockets_can_be_made(long_tmpdir: Path) -> None:
    resources = EngineResources()
    try:
        assert resources.folder.parent == Path("/tmp")
        assert resources.folder.name.startswith("coreward.")
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(resources.folder / str(uuid.uuid4())))
        remove_orphans()
        assert resources.folder.is_dir()  # it lives
    finally:
        resources.close()
    assert not resources.folder.exists()


def test_without_a_short_directory_preflight_says_both_lengths(
    long_tmpdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(sockets.problems(True)) == []
    monkeypatch.setattr(sockets, "FALLBACK", Path("/nowhere"))
    first, second = sockets.problems(True)
    assert first == second
    length = len(str(long_tmpdir))
    assert (
        f"TMPDIR: {long_tmpdir} has {length} bytes, and /nowhere cannot be written instead; allowed: up to 39" in first
    )
    assert "up to 51 for those of a tensor-parallel engine" in first
    assert len(list(sockets.problems(False))) == 1
