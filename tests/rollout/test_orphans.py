"""What a killed engine leaves on its host is removed; what lives, or is somebody else's, is not."""

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_coreward.rollout.orphans import remove_orphans
from megatron_coreward.rollout.sockets import PREFIX
from megatron_coreward.weights.mailbox import SHARED_MEMORY
from tests.rollout.engine_process import EngineProcess

ROOT = Path(__file__).parents[2]
# An engine whose child has mapped a segment, as vLLM's workers do.
ENGINE = """
import mmap, os, subprocess, sys
from megatron_coreward.rollout.orphans import EngineResources
belongings = EngineResources()
(belongings.folder / "socket").touch()
mapping = "import mmap, sys; f = open(sys.argv[1], 'rb+'); m = mmap.mmap(f.fileno(), 0)"
child = f"{mapping}; print(flush=True); sys.stdin.read()"
worker = subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdout.readline()
belongings.note_segments()
print(belongings.folder, flush=True)
sys.stdin.readline()
worker.stdin.close()
belongings.close()
"""


@pytest.fixture
def segment() -> Iterator[Path]:
    path = SHARED_MEMORY / f"vllm_dist_test-{uuid.uuid4().hex}-[0-1]-cpushm_0"
    path.write_bytes(b"0" * 4096)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def engine(segment: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process and its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(segment)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(timeout=60)


def test_what_an_engine_has_goes_when_it_is_killed_and_not_before(
    engine: tuple["subprocess.Popen[str]", Path], segment: Path
) -> None:
    process, folder = engine
    remove_orphans()
    assert (folder / "socket").exists()
    assert segment.exists()
    process.kill()
    process.wait(timeout=60)
    assert segment.exists()
    remove_orphans()
    assert not folder.exists()
    assert not segment.exists()


def test_an_engine_that_ends_well_leaves_nothing(engine: tuple["subprocess.Popen[str]", Path], segment: Path) -> None:
    process, folder = engine
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert not folder.exists()
    assert not segment.exists()


def test_a_list_cannot_name_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    precious = tmp_path / "precious"
    precious.touch()
    folder = tmp_path / f"{PREFIX}x"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "segments").write_text(f"{precious}\n../..{precious}\n")
    remove_orphans()
    assert precious.exists()
    assert not folder.exists()


def test_folders_of_other_users_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"{PREFIX}x"
    folder.mkdir()
    (folder / "lock").touch()
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    remove_orphans()
    assert folder.exists()


@pytest.mark.engine
def test_a_tensor_parallel_engine_that_is_killed_with_all_its_processes_leaves_nothing_for_good(
    start_engine: Callable[[str], EngineProcess],
) -> None:
    remove_orphans()
    engine = start_engine("tied, TP 2")
    # The engine's own: tests that run beside this one have engines, too.
    opened = (Path(file.path) for file in psutil.Process(engine.pid).open_files())
    (folder,) = {path.parent for path in opened if path.parent.name.startswith(PREFIX)}
    sockets = [path for path in folder.iterdir() if path.is_socket()]
    segments = [SHARED_MEMORY / name for name in (folder / "segments").read_text().split()]
    assert len(sockets) >= 2
    assert any(path.name.startswith("psm_") and path.exists() for path in segments)
    everything = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    for process in everything:
        process.suspend()  # so that none tidies up when it sees another one go
    for process in everything:
        process.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(everything[1:], timeout=60)[1] == []
    engine.kill()
    assert folder.exists()
    assert any(path.exists() for path in segments)
    remove_orphans()
    assert not folder.exists()
    assert not any(path.exists() for path in segments)
