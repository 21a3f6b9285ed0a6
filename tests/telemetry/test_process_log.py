"""The output of a worker and of what it starts is in its log, with the stacks of a call that takes too long."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward.telemetry.process_log import LoggedWorker

ROOT = Path(__file__).parents[2]
WORKER = """
import os, subprocess, sys, time
from pathlib import Path
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog

class Worker(LoggedWorker):
    def speak(self):
        print("spoken")
        print("complained", file=sys.stderr)
        subprocess.run(["echo", "from a child"], check=True)

    def wait_for_a_peer(self, seconds):
        time.sleep(seconds)

print("before", flush=True)
worker = Worker(ProcessLog(Path(sys.argv[1]), 0.5))
worker.speak()
worker.wait_for_a_peer(float(sys.argv[2]))
worker.wait_for_a_peer(0.0)
time.sleep(0.7)
"""


def run_worker(log: Path, waits_s: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WORKER, str(log), str(waits_s)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)


def test_all_that_is_printed_goes_to_the_log_and_attempts_follow_each_other(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine_0.log"
    for _ in range(2):
        process = run_worker(log, 0.0)
        assert (process.stdout, process.stderr) == ("before\n", "")
    text = log.read_text()
    for line in ("--- process ", "spoken", "complained", "from a child"):
        assert text.count(line) == 2
    assert "wait_for_a_peer" not in text  # nothing took long; time between calls does not count


def test_a_call_that_takes_long_shows_where_it_stands_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    run_worker(log, 1.0)
    assert "Timeout (0:00:00.500000)!" in log.read_text()
    assert "in wait_for_a_peer" in log.read_text()


def test_without_a_log_nothing_is_redirected(capfd: pytest.CaptureFixture[str]) -> None:
    class Worker(LoggedWorker):
        def add(self, a: int, *, b: int) -> int:
            """a + b."""
            print("added")
            return a + b

    assert Worker(None).add(1, b=2) == 3
    assert capfd.readouterr().out == "added\n"
    assert Worker.add.__doc__ == "a + b."
