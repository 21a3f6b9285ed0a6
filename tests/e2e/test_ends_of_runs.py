"""How real runs end when the machine around them fails: trackers, paths, full disks, Ctrl-C, replaced files.

Three runs, each through several kinds at once, since a start costs half a minute. Each kind has quick tests of its own:
tests/telemetry/test_trackers.py, tests/rollout/test_sockets.py, tests/trainer/test_finish.py, tests/test_errors.py,
tests/checkpoint/test_inputs.py and the table of tests/preflight/broken_recipes.py.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_coreward.checkpoint.store import saved_steps
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.trackers import read_missed
from tests.e2e.conftest import Task
from tools.soak import Attempt, last_step, leftover_segments

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

# Stands for the package: a run of it takes rows, and cannot be finished.
WANDB = """
from pathlib import Path

class Run:
    def define_metric(self, *_, **__): pass
    def log(self, row):
        with open(Path(__file__).with_name("rows"), "a") as file:
            file.write(f"{row['step']}\\n")
    def finish(self):
        if not Path(__file__).with_name("mended").exists():
            raise ConnectionError("\\x1b[2Jthe server is away")

def init(**_):
    return Run()
"""


@pytest.fixture(autouse=True)
def started() -> Iterator[list[Attempt]]:
    attempts: list[Attempt] = []
    yield attempts
    for attempt in attempts:
        attempt.end()


def wait_for(attempt: Attempt, condition: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert attempt.process.poll() is None, attempt.wait()[1]
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.01)


def start(config: RunConfig, started: list[Attempt]) -> Attempt:
    started.append(Attempt.start(config))
    return started[-1]


def run(config: RunConfig, started: list[Attempt]) -> tuple[int, str, float]:
    """Status, output and seconds of the command of a run."""
    begin = time.monotonic()
    attempt = start(config, started)
    status, output = attempt.wait()
    assert attempt.orphans() == []
    assert leftover_segments() == []
    assert "Traceback" not in output
    return status, output, time.monotonic() - begin


def half_written(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.rglob(".*") if path.name.endswith((".tmp", ".partial", ".removed"))]


def test_trackers_paths_and_a_blocked_page_end_no_run_and_the_same_command_completes_it(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[Attempt]
) -> None:
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(WANDB)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(__file__).parents[2]}")
    long = tmp_path / ("t" * 80)  # too long for the sockets of Ray and of the engine's two processes
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    config = task.config(
        "majority_voting",
        f"run_dir={tmp_path / 'run'}",
        "steps=2",
        "checkpoint.every=1",
        "actor.tensor_parallel=1",
        "rollout.tensor_parallel=2",
        "telemetry.wandb_project=test",
        "telemetry.console=plain",
    )
    run_dir = config.run_dir
    run_dir.mkdir()
    (run_dir / "tensorboard").write_text("in the way")
    (run_dir / "report.html").mkdir()

    status, output, _ = run(config, started)
    assert status == 0, output
    assert output.count("tensorboard failed when it was opened") == 1
    assert output.count("wandb failed when it was finished (ConnectionError: \\x1b[2Jthe server is away)") == 1
    assert "report.html was not written: cannot write " in output
    assert "\x1b" not in output
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [0, 1, 2]
    assert (package / "rows").read_text() == "0\n1\n2\n"
    assert read_missed(run_dir) == {"tensorboard": 0, "wandb": 3}

    (run_dir / "tensorboard").unlink()
    (run_dir / "report.html").rmdir()
    (package / "mended").touch()
    status, output, seconds = run(config, started)
    assert status == 0, output
    assert seconds < 30  # no process is started for it
    assert "tensorboard has the rows from step 0 on" in output
    assert "wandb has the rows from step 3 on" in output
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert list((run_dir / "tensorboard").iterdir())
    assert read_missed(run_dir) == {}
    status, output, _ = run(config, started)
    assert status == 2
    assert "has done its 2 steps" in output


def test_ctrl_c_says_how_to_go_on_and_what_was_replaced_meanwhile_is_refused_or_accepted(
    task: Task, tmp_path: Path, started: list[Attempt]
) -> None:
    train = tmp_path / "train.parquet"
    shutil.copy(task.folder / "train.parquet", train)
    options = (f"run_dir={tmp_path / 'run'}", f"data.train_files=[{train}]", "actor.tensor_parallel=1")
    config = task.config("majority_voting", *options, "steps=3", "checkpoint.every=1", "telemetry.console=plain")
    run_dir = config.run_dir
    attempt = start(config, started)
    wait_for(attempt, lambda: bool(saved_steps(run_dir)))
    begin = time.monotonic()
    os.killpg(attempt.process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    status, output = attempt.wait()
    assert time.monotonic() - begin < 60
    assert status == 1
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("interrupted; the same command goes on after step ")
    assert last.endswith(f", in {run_dir}")
    assert attempt.orphans() == []
    assert leftover_segments() == []

    shutil.copy(task.folder / "train_rephrased.parquet", train)
    status, output, seconds = run(config, started)
    assert status == 2
    assert seconds < 30
    assert f"data.train_files[0]: {train}, not the file that " in output
    accepting = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"changed_inputs": "accept"})}
    )
    status, output, _ = run(accepting, started)
    assert status == 0, output
    assert f"data.train_files[0]: {train}" in (run_dir / "events.log").read_text()
    assert last_step(run_dir) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Takes what is free, and what is freed in the moments after."""
    filler, size = folder / "filler", 2**20
    with filler.open("ab", buffering=0) as file:
        for _ in range(20):
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError:  # the run takes some, too
                    size //= 2
            size = 2**16
            time.sleep(0.01)
    return filler


def test_a_disk_that_runs_full_is_reported_with_the_file_and_leaves_nothing_half_written(
    task: Task, small_disk: Path, started: list[Attempt]
) -> None:
    options = (f"run_dir={small_disk / 'run'}", "actor.tensor_parallel=1", "checkpoint.every=1", "checkpoint.keep=1")
    config = task.config("majority_voting", *options, "steps=200", "telemetry.console=plain")
    run_dir = config.run_dir
    attempt = start(config, started)
    wait_for(attempt, lambda: bool(saved_steps(run_dir)))
    filler = fill(small_disk)
    status, output = attempt.wait()
    assert status == 1
    assert "Traceback" not in output
    line = output.splitlines()[-1]
    assert line.startswith("the run failed: ")
    for part in (str(run_dir), "No space left on device", "make room there", "the same command goes on after step "):
        assert part in line
    assert attempt.orphans() == []
    assert half_written(run_dir) == []
    report = subprocess.run(
        [sys.executable, "-m", "megatron_coreward", "report", str(run_dir)], capture_output=True, text=True, check=False
    )
    assert report.returncode == 1
    assert f"`report` failed: cannot write {run_dir / 'report.html'}: No space left on device" in report.stderr
    filler.unlink()
    last = saved_steps(run_dir)[-1]
    status, output, _ = run(config.model_copy(update={"steps": last + 2}), started)
    assert status == 0, output
    assert last_step(run_dir) == last + 2
