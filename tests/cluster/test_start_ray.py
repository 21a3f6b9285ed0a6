"""Ray's start: no process that nobody uses, and no wait without an end where one of Ray's own dies in it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

MARK = "MEGATRON_COREWARD_TEST_START_RAY"
CHILDREN = """
import psutil
from megatron_coreward.cluster.ray_start import start_ray
start_ray(120)
for process in psutil.Process().children(recursive=True):
    print("runs", " ".join(process.cmdline())[:2000])
"""
RAYLET_DIES = """
import threading, time
import psutil
from megatron_coreward.cluster.ray_start import start_ray

def kill():
    while True:
        for process in psutil.Process().children(recursive=True):
            if process.name() == "raylet":
                process.kill()
                return
        time.sleep(0.01)

threading.Thread(target=kill, daemon=True).start()
start_ray(20)
print("started")
"""


def run(program: str, mark: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=200,
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2]), MARK: mark},
        check=False,
    )


def left(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:60])
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue
    return found


def test_no_worker_is_started_that_nobody_asked_for() -> None:
    done = run(CHILDREN, "children")
    running = [line for line in done.stdout.splitlines() if line.startswith("runs")]
    assert any("raylet" in line for line in running), done.stderr
    assert not [line for line in running if line.startswith("runs ray::IDLE")]


def test_a_start_that_hangs_is_ended_with_a_message_and_leaves_nothing() -> None:
    done = run(RAYLET_DIES, "raylet")
    assert done.returncode == 1
    assert "started" not in done.stdout
    # Where Ray itself notices, it raises; most of the time it does not, and nothing but a limit ends the wait.
    stalled = "the run failed: stalled: the start of Ray took longer than 20 s (watchdog.start_limit_s)"
    assert stalled in done.stderr or "Traceback" in done.stderr
    deadline = time.monotonic() + 60
    while processes := left("raylet"):
        assert time.monotonic() < deadline, processes
        time.sleep(0.5)
