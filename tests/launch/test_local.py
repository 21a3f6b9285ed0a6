"""`launch local` through nemo-run's executor, with a stand-in for the attempt."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_coreward.errors import RunError
from tests.launch.arguments import launch_command, write_recipe

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

# Takes the statuses of its attempts from a file, one a line; `wait` is left by SIGTERM alone, with 75.
PYTHON = """#!/bin/bash
here=$(dirname "$0")
status=$(head -n 1 "$here/statuses"); sed -i 1d "$here/statuses"
while [ "$1" != --status-file ]; do shift; done
echo "attempt $status, NOTE=$NOTE"
if [ "$status" = wait ]; then
    trap 'echo "saved"; echo 75 > "$2"; exit 75' TERM
    touch "$here/waiting"; while true; do sleep 0.1; done
fi
echo "$status" > "$2"
exit "$status"
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"kind": "local", "python": str(python), "env": {"NOTE": "a 'b' c"}}))
    return ["local", str(write_recipe(tmp_path)), "--cluster", str(cluster)]


@pytest.mark.long
def test_it_runs_again_until_it_is_finished(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "statuses").write_text("75\n0\n")
    launch_command(*words)
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("attempt")] == [
        "attempt 75, NOTE=a 'b' c",
        "attempt 0, NOTE=a 'b' c",
    ]
    assert sum(line.startswith("in the queue:") for line in lines) == 2
    assert lines[-1] == "finished: all steps are done"
    assert (tmp_path / "Run_1" / "launch" / "train.log").read_text().count("attempt") == 2


@pytest.mark.long
def test_a_failure_is_an_error(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "statuses").write_text("1\n0\n")
    with pytest.raises(RunError, match="failed: exit status 1"):
        launch_command(*words)
    assert (tmp_path / "statuses").read_text() == "0\n"


@pytest.mark.long
def test_an_interrupt_lets_the_training_save(words: list[str], tmp_path: Path) -> None:
    """Even if it comes while the job is still being submitted, as it may here."""
    (tmp_path / "statuses").write_text("wait\n")
    command = [sys.executable, "-m", "tests.launch.arguments", *words]
    launcher = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    killer = threading.Timer(100, launcher.kill)
    killer.start()
    try:
        while not (tmp_path / "waiting").exists() and launcher.poll() is None:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        out, _ = launcher.communicate()
    finally:
        killer.cancel()
        launcher.kill()
    assert "stopped; the same launch command goes on from the last checkpoint" in out
    assert (tmp_path / "Run_1" / "launch" / "train.log").read_text().splitlines()[-1] == "saved"
