"""A process that Ray's memory monitor has ended is reported with its name, how full the node was, and our keys."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward.cluster.memory_kill import memory_kill
from megatron_coreward.cluster.watchdog import WorkerDied

# As Ray 2.60 says it, without the tables in the middle.
RECORDED = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: c2c8fd) was "
    "22.80GB used / 23.54GB limit (0.968564)\nOOM kill reason: Memory usage 24481360281B exceeded threshold\n"
    "Selected to kill: (Task: job ID=01000000, pid=2535, actual memory used=3.04GB, worker ID=9920)\n]\n"
    "Refer to the documentation on how to address the out of memory issue: " + "advice " * 200
)

KILLED = """
import os, time
os.environ["RAY_memory_usage_threshold"] = "0.001"
os.environ["RAY_memory_monitor_refresh_ms"] = "100"
import ray
from megatron_coreward.cluster.ray_start import start_ray, stop_ray
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied

class Worker:
    def sleep(self, seconds):
        time.sleep(seconds)

start_ray(120)
worker = ray.remote(Worker).options(num_cpus=0).remote()
watchdog = Watchdog()
watchdog.name(worker, "actor rank", 3)
try:
    watchdog.get([worker.sleep.remote(60)], "update")
except WorkerDied as death:
    print("DIED", death)
stop_ray()
"""


def test_of_rays_advice_who_how_much_and_our_keys_are_left() -> None:
    message = str(WorkerDied("engine", 1, "rollouts", RuntimeError(RECORDED), "logs/engine_1.log"))
    assert message.startswith(
        "engine 1 was killed by Ray's memory monitor: 22.80 of 23.54 GB of node 192.0.2.2 were in use, 3.04 GB of them "
        "by it; less is taken with rollout.kv_cache_gib, "
    )
    assert "during rollouts; what it printed is in logs/engine_1.log" in message
    assert "advice" not in message
    assert len(message) < 700


def test_other_words_say_less_and_other_errors_nothing() -> None:
    assert str(memory_kill("the actor died: node running low on memory")).startswith(
        "was killed by Ray's memory monitor; less is taken with"
    )
    assert memory_kill("The actor died unexpectedly before finishing this task.") is None


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_rays_own_monitor_is_named_so() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        text=True,
        timeout=150,
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("DIED")]
    assert line.startswith("DIED actor rank 3 was killed by Ray's memory monitor: ")
    assert " GB of them by it; less is taken with rollout.kv_cache_gib" in line
