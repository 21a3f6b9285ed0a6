"""Waits say of whom they wait and end when they stall; the dead are named, even where their peers complain first."""

import errno
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_coreward.config.schema import WatchdogSettings
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.trainer.preemption import Preempted, StopRequest
from megatron_coreward.trainer.watchdog import Watchdog, WorkerDied

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

    from megatron_coreward.trainer.cluster import start_ray, stop_ray

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


def watching(pair: list[Any], tell: Any = lambda text: None, stop: Any = None, **settings: float) -> Watchdog:
    watchdog = Watchdog(WatchdogSettings(**settings), tell, stop)
    for index, worker in enumerate(pair):
        watchdog.name(worker, "actor rank", index)
    return watchdog


def test_results_come_in_the_order_of_the_calls(pair: list[Any]) -> None:
    heard: list[int] = []
    calls = [pair[0].sleep.remote(0.3), pair[1].sleep.remote(0.1)]
    assert watching(pair).get(calls, "sleep", on_result=heard.append) == [0.3, 0.1]
    assert heard == [1, 0]


def test_a_long_wait_is_told_and_a_stall_ends_it_naming_who_is_late(pair: list[Any]) -> None:
    told: list[str] = []
    watchdog = watching(pair, told.append, warn_after_s=0.6, limit_s=1.5)
    with pytest.raises(RunError, match=r"stalled: rollouts was awaited of actor rank 1 for \d s .*watchdog.limit_s"):
        watchdog.get([pair[0].sleep.remote(0.0), pair[1].sleep.remote(30.0)], "rollouts")
    assert told
    assert "still waiting for rollouts of actor rank 1 after" in told[0]


def test_a_death_is_named_though_a_peer_that_noticed_it_reports_first(pair: list[Any]) -> None:
    calls = [pair[0].fail.remote(RuntimeError("Connection closed by peer")), pair[1].die.remote(1.0)]
    with pytest.raises(WorkerDied, match="actor rank 1 died while update was awaited of it") as caught:
        watching(pair).get(calls, "update")
    assert (caught.value.kind, caught.value.index) == ("actor rank", 1)


def test_a_call_to_one_that_is_dead_already_is_the_same_error(pair: list[Any]) -> None:
    watchdog = watching(pair)
    for _ in range(2):
        with pytest.raises(WorkerDied, match="actor rank 0"):
            watchdog.get([pair[0].die.remote()], "update")


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
