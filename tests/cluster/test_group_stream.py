"""Groups go to engines that have room, come back when they are complete, and outlive the engines that draw them."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from megatron_coreward.cluster.group_stream import GroupStream
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.config.schema import WatchdogSettings
from megatron_coreward.errors import RunError
from megatron_coreward.rollout.requests import GroupName, GroupRequest, SamplingRequest
from megatron_coreward.types import Completion, Role
from tests.trainer.stream_fakes import StreamingFakes

pytestmark = pytest.mark.timeout(60)
REQUEST = SamplingRequest([1, 2], n=4, seed=0, temperature=1.0, top_p=1.0, max_tokens=64)


def groups(count: int, role: Role = "policy", watcher: Any = None) -> list[GroupRequest]:
    return [GroupRequest(GroupName(1, role, place), REQUEST, watcher) for place in range(count)]


def names(asked: list[GroupRequest]) -> list[GroupName]:
    return [one.name for one in asked]


@pytest.fixture
def engines() -> StreamingFakes:
    fakes = StreamingFakes([])
    for engine in fakes.engines:
        engine.held = 0
    return fakes


@pytest.fixture
def stream(engines: StreamingFakes) -> Iterator[GroupStream]:
    stream = GroupStream(engines, 8, Watchdog())
    yield stream
    stream.close()


def test_groups_come_back_in_the_order_asked_for_whole_and_by_samples(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    asked = groups(10)
    stream.submit(asked)
    stream.go_on(0)
    stream.wait(names(asked))
    assert not stream.in_flight("policy")
    for group in stream.collect(names(asked)):
        assert [completion.answer for completion in group] == ["0", "1", "2", "0"]
    assert engines.most == [8, 8]  # both are kept full, and neither is given more than it has room for
    assert len(engines.fed) == 10


def test_nothing_is_handed_out_before_there_are_weights_of_the_role(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    stream.submit(groups(2))
    assert stream.stalled("policy")
    for engine in engines.engines:
        engine.held = 1
    stream.go_on(1)  # the teacher's
    assert stream.stalled("policy")
    assert engines.fed == []


def test_a_group_ends_when_its_watcher_says_so(stream: GroupStream, engines: StreamingFakes) -> None:
    heard: list[tuple[int, int]] = []

    class Watcher:
        def completed(self, sample: int, completion: Completion) -> bool:
            heard.append((sample, threading.get_ident()))
            return len(heard) == 2

    asked = [*groups(1, watcher=Watcher()), GroupRequest(GroupName(1, "policy", 9), REQUEST)]
    stream.submit(asked)
    stream.go_on(0)
    stream.wait(names(asked))
    first, second = stream.collect(names(asked))
    assert (len(first), len(second)) == (2, 4)
    assert engines.events == ["abort 0"]
    assert len({sample for sample, _ in heard}) == 2
    assert {thread for _, thread in heard} != {threading.get_ident()}


def test_an_engine_that_dies_is_named_and_only_what_had_not_ended_is_drawn_again(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    asked = groups(6)
    engines.paused = True
    stream.submit(asked)
    stream.go_on(0)
    engines.kill(1)
    with pytest.raises(WorkerDied, match="engine 1 died during rollouts") as death:
        stream.wait(names(asked))
    engines.paused = False
    stream.gone(1, death.value)
    engines.restart(1)
    stream.restarted(1)
    engines.engines[1].held = 0
    stream.go_on(0)
    stream.wait(names(asked))
    assert set(engines.drawn.values()) == {1}
    assert len(engines.drawn) == 24


def test_a_new_process_is_asked_for_nothing_in_the_name_of_the_dead_one(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    """The stream has not heard of the death when somebody else starts the engine again."""
    asked = groups(6)
    stream.submit(asked)
    stream.go_on(0)
    stream.gone(1, WorkerDied("engine", 1, "weights", ConnectionError("gone")))
    engines.restart(1)
    engines.engines[1].held = 0
    asks, take = list[int](), engines.take
    engines.take = lambda place, patience_s: asks.append(place) or take(place, patience_s)  # type: ignore
    time.sleep(0.05)  # what the other engine has ends, and is heard of
    assert 1 not in asks
    stream.restarted(1)
    assert 1 in asks
    stream.go_on(0)
    stream.wait(names(asked))
    assert [len(group) for group in stream.collect(names(asked))] == [4] * 6


def test_what_was_aborted_is_counted_with_the_step_whose_groups_are_collected(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    one, two, three = (GroupName(step, "teacher", 0) for step in (1, 2, 3))
    stream.submit([GroupRequest(one, REQUEST)])
    for engine in engines.engines:
        engine.held = 1
    result = engines.result

    def with_aborts(call: Any) -> Any:
        taken = result(call)
        return taken and replace(taken, aborted=((one, 5), (two, 7), (three, 9)))

    engines.result = with_aborts  # type: ignore[method-assign]
    stream.go_on(1)
    stream.wait([one])
    assert stream.take_metrics() == {}
    stream.collect([one])
    found = stream.take_metrics()
    times = found["rollout/aborted_samples"]  # as often as the fake was asked
    assert times >= 1
    assert found["rollout/aborted_tokens"] == 5 * times


def test_settling_waits_for_what_is_on_its_way_and_leaves_the_rest(
    stream: GroupStream, engines: StreamingFakes
) -> None:
    asked = groups(12)
    stream.submit(asked)
    stream.go_on(0)
    stream.settle()
    assert all(not engine.active for engine in engines.engines)
    assert stream.stalled("policy")
    stream.go_on(0)
    stream.wait(names(asked))


def test_a_wait_that_has_become_a_stall_names_the_engines_that_draw(engines: StreamingFakes) -> None:
    notes: list[str] = []
    settings = WatchdogSettings(warn_after_s=0.6, limit_s=1.2)
    stream = GroupStream(engines, 8, Watchdog(settings, notes.append))
    engines.paused = True
    stream.submit(groups(1))
    stream.go_on(0)
    with pytest.raises(RunError, match="stalled: waited for rollouts from engine 0 for"):
        stream.wait([GroupName(1, "policy", 0)])
    assert "still waiting for rollouts from engine 0" in notes[0]
    stream.close()


def test_an_error_of_the_watcher_reaches_whoever_waits(stream: GroupStream) -> None:
    class Watcher:
        def completed(self, sample: int, completion: Completion) -> bool:
            raise ZeroDivisionError

    stream.submit(groups(1, watcher=Watcher()))
    stream.go_on(0)
    with pytest.raises(ZeroDivisionError):
        stream.wait([GroupName(1, "policy", 0)])


def test_a_group_cannot_be_submitted_twice(stream: GroupStream) -> None:
    stream.submit(groups(1))
    with pytest.raises(ValueError, match="submitted before"):
        stream.submit(groups(1))
