"""Waits say of whom they wait and end when they stall; the dead are named, even where their peers complain first."""

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError

from megatron_coreward.cluster.preemption import Preempted, StopRequest
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.config.schema import WatchdogSettings
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self, error: Exception, after_s: float = 0.0) -> None:
        time.sleep(after_s)
        raise error

    def die(self, after_s: float = 0.0) -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), 9)


@pytest.fixture(scope="module")
def remote() -> Iterator[Any]:
    import ray

    from megatron_coreward.cluster.ray_start import start_ray, stop_ray

    started = not ray.is_initialized()
    start_ray()
    yield ray.remote(Worker).options(num_cpus=0)
    if started:
        stop_ray()


@pytest.fixture
def pair(remote: Any) -> Iterator[list[Any]]:
    import ray

    workers = [remote.remote() for _ in range(2)]
    ray.get([worker.pid.remote() for worker in workers], timeout=60)
    yield workers
    for worker in workers:
        ray.kill(worker)


def watching(pair: list[Any], notify: Any = lambda text: None, stop: Any = None, **settings: float) -> Watchdog:
    watchdog = Watchdog(WatchdogSettings(**settings), notify, stop)
    for index, worker in enumerate(pair):
        watchdog.name(worker, "actor rank", index)
    return watchdog


def test_results_come_in_the_order_of_the_calls(pair: list[Any]) -> None:
    heard: list[int] = []
    calls = [pair[0].sleep.remote(0.3), pair[1].sleep.remote(0.1)]
    assert watching(pair).get(calls, "sleep", on_result=heard.append) == [0.3, 0.1]
    assert heard == [1, 0]


def test_a_long_wait_is_reported_and_a_stall_ends_it_naming_who_is_late(pair: list[Any]) -> None:
    notes: list[str] = []
    watchdog = watching(pair, notes.append, warn_after_s=0.6, limit_s=1.5)
    with pytest.raises(RunError, match=r"stalled: waited for rollouts from actor rank 1 for \d s .*watchdog.limit_s"):
        watchdog.get([pair[0].sleep.remote(0.0), pair[1].sleep.remote(30.0)], "rollouts")
    assert notes
    assert "still waiting for rollouts from actor rank 1 after" in notes[0]


def test_a_death_is_named_though_a_peer_that_noticed_it_reports_first(pair: list[Any]) -> None:
    calls = [pair[0].fail.remote(RuntimeError("Connection closed by peer")), pair[1].die.remote(1.0)]
    with pytest.raises(WorkerDied, match="actor rank 1 died during update") as caught:
        watching(pair).get(calls, "update")
    assert (caught.value.kind, caught.value.index) == ("actor rank", 1)


def test_a_result_that_went_with_its_node_is_the_death_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(call: Any) -> Any:
        raise ObjectLostError("0" * 56, None, "")

    monkeypatch.setattr(ray, "get", lost)
    watchdog = Watchdog()
    watchdog.name(SimpleNamespace(_actor_id="a"), "engine", 1)
    call = SimpleNamespace(task_id=lambda: SimpleNamespace(actor_id=lambda: "a"))
    with pytest.raises(WorkerDied, match=r"engine 1 died during rollouts \(ObjectLostError"):
        watchdog._result(call, [], "rollouts")


def test_a_call_to_one_that_is_dead_already_is_the_same_error(pair: list[Any]) -> None:
    watchdog = watching(pair)
    for _ in range(2):
        with pytest.raises(WorkerDied, match="actor rank 0"):
            watchdog.get([pair[0].die.remote()], "update")


class Unable(LoggedWorker):
    def __init__(self, log: ProcessLog | None) -> None:
        super().__init__(log)
        print("a lot of detail")
        raise ValueError("no memory is left:\n  0 of 80 GiB\nTake a smaller model.")

    def ready(self) -> bool:
        return True


def test_one_that_cannot_start_is_an_error_with_its_reason_and_where_it_printed_more(
    remote: Any, tmp_path: Path
) -> None:
    import ray

    watchdog = Watchdog(WatchdogSettings(), logs=tmp_path)
    worker = ray.remote(Unable).options(num_cpus=0).remote(watchdog.log_of("engine", 3))
    watchdog.name(worker, "engine", 3)
    with pytest.raises(WorkerDied) as caught:
        watchdog.get([worker.ready.remote()], "its start")
    log = tmp_path / "engine_3.log"
    assert str(caught.value) == (
        "engine 3 could not start: ValueError: no memory is left: 0 of 80 GiB Take a smaller model.; "
        f"what it printed is in {log}"
    )
    assert "a lot of detail" in log.read_text()


def test_memory_that_is_short_is_a_run_error_that_says_what_takes_less(pair: list[Any]) -> None:
    short = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RunError, match=r"update: actor rank 1: CUDA out of memory.* \(less: actor.tokens_per_micro"):
        watching(pair).get([pair[1].fail.remote(short)], "update")


def test_a_full_disk_and_a_bad_gradient_are_run_errors_of_one_line(pair: list[Any]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RunError, match="save: actor rank 0: .*No space left on device"):
        watching(pair).get([pair[0].fail.remote(full)], "save")
    with pytest.raises(RunError, match="update: actor rank 1: the gradient"):
        watching(pair).get([pair[1].fail.remote(FloatingPointError("the gradient is not finite"))], "update")


@pytest.mark.parametrize("error", [InputError("no model"), RunError("stale weights"), KeyError("bug")])
def test_other_errors_keep_their_type(pair: list[Any], error: Exception) -> None:
    with pytest.raises(type(error)):
        watching(pair).get([pair[0].fail.remote(error)], "start")


def test_a_request_to_stop_ends_only_waits_that_may_be_given_up(pair: list[Any]) -> None:
    stop = StopRequest()
    stop.signal = "SIGTERM"
    watchdog = watching(pair, stop=stop)
    assert watchdog.get([pair[0].sleep.remote(0.7)], "update") == [0.7]
    begin = time.monotonic()
    with pytest.raises(Preempted, match="SIGTERM"):
        watchdog.get([pair[0].sleep.remote(5.0)], "rollouts", interruptible=True)
    assert time.monotonic() - begin < 3
