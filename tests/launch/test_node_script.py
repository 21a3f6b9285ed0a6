"""The script of a node, with a stand-in for Python: who gets the signal, the exit status, when a node leaves."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from megatron_coreward.launch import scripts

# `ray start` stays until it is asked to go; `ray status` counts who has started; everything it does is in `events`.
PYTHON = """#!/bin/bash
here=$(dirname "$0")
say() { echo "$1" >> "$here/events"; }
case "$*" in
    *" status "*) shopt -s nullglob; for node in "$here"/up-*; do echo " 1 node_$node"; done; exit 0 ;;
    *" start "*)
        trap 'say "ray $SLURM_NODEID ends"; rm -f "$here/up-$SLURM_NODEID"; exit 0' TERM
        touch "$here/up-$SLURM_NODEID"; echo "Ray runtime started"
        while true; do sleep 0.05; done ;;
esac
"""
DRIVER = """#!/bin/bash
cd "$(dirname "$0")"
trap 'echo "training saves" >> events; sleep 0.5; echo "training ends" >> events; exit 75' TERM
echo "training begins" >> events
for _ in $(seq 600); do [ ! -e finish ] || exit "$(cat finish)"; sleep 0.05; done
"""


class Nodes:
    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.processes: list[subprocess.Popen[bytes]] = []
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        text = scripts.node_script(PurePosixPath(folder), str(python), count, 0, [], None)
        (folder / scripts.NODE).write_text(text)
        (folder / scripts.DRIVER).write_text(DRIVER)

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        env = os.environ | {"SLURM_NODEID": str(rank), "SLURM_JOB_ID": "7", scripts.RAY_HEAD: "10.0.0.1:6379"}
        command = ["bash", str(self.folder / scripts.NODE)]
        process = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

    def events(self) -> list[str]:
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, event: str) -> None:
        end = time.monotonic() + 30
        while event not in self.events():
            assert time.monotonic() < end, f"{event!r} not in {self.events()}"
            time.sleep(0.05)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Callable[[int], Nodes]]:
    made: list[Nodes] = []

    def make(count: int) -> Nodes:
        made.append(Nodes(tmp_path, count))
        return made[-1]

    yield make
    for process in (process for group in made for process in group.processes):
        if process.poll() is None:
            process.terminate()
        process.wait(30)


@pytest.mark.long
@pytest.mark.parametrize("status", [0, 1, 75])
def test_the_exit_status_is_that_of_the_training(nodes: Callable[[int], Nodes], status: int) -> None:
    group = nodes(1)
    (group.folder / "finish").write_text(str(status))
    assert group.start(0).wait(30) == status
    assert group.events() == ["training begins", "ray 0 ends"]


@pytest.mark.long
def test_the_training_begins_when_all_nodes_are_up_and_all_leave_with_it(nodes: Callable[[int], Nodes]) -> None:
    group = nodes(2)
    head = group.start(0)
    time.sleep(1)
    assert group.events() == []
    worker = group.start(1)
    group.wait_for("training begins")
    (group.folder / "finish").write_text("0")
    assert head.wait(30) == 0
    assert worker.wait(30) == 0
    assert group.events() == ["training begins", "ray 0 ends", "ray 1 ends"]


@pytest.mark.long
def test_a_signal_to_all_processes_lets_the_training_save_while_ray_is_there(nodes: Callable[[int], Nodes]) -> None:
    group = nodes(2)
    head, worker = group.start(0), group.start(1)
    group.wait_for("training begins")
    for process in (head, worker):  # as Slurm signals a step: every process of the group
        os.killpg(process.pid, signal.SIGTERM)
    assert head.wait(30) == 75
    assert worker.wait(30) == 0
    assert group.events() == ["training begins", "training saves", "training ends", "ray 0 ends", "ray 1 ends"]


def test_a_signal_before_the_training_ends_the_node(nodes: Callable[[int], Nodes]) -> None:
    group = nodes(2)
    head = group.start(0)
    end = time.monotonic() + 30
    while not (group.folder / "up-0").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(head.pid, signal.SIGTERM)
    assert head.wait(30) == 143
    assert group.events() == ["ray 0 ends"]


def test_a_head_that_others_cannot_reach_is_an_error(nodes: Callable[[int], Nodes]) -> None:
    group = nodes(2)
    env = os.environ | {"SLURM_NODEID": "0", "SLURM_JOB_ID": "7", scripts.RAY_HEAD: "127.0.1.1:6379"}
    command = ["bash", str(group.folder / scripts.NODE)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "127.0.1.1:6379 to itself; other nodes cannot reach it" in done.stderr
