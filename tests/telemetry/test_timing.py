from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.telemetry.timing import PhaseTimer


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_phases_and_what_lies_outside_add_up_to_the_step(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    clock.now += 1
    with timer.phase("rollout"):
        clock.now += 4
    with timer.phase("update"):
        clock.now += 2
    clock.now += 1
    assert timer.metrics() == {
        "step_time_s": 8.0,
        "time/rollout_s": 4.0,
        "time/update_s": 2.0,
        "time/outside_s": 2.0,
        "time/outside_share": 0.25,
    }


def test_a_phase_inside_another_is_part_of_it_and_not_counted_twice(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer.phase("rollout"):
        clock.now += 1
        with timer.phase("sample"):
            clock.now += 3
    assert timer.seconds == {"rollout": 4.0, "rollout.sample": 3.0}
    assert timer.metrics()["time/rollout.sample_s"] == 3.0
    assert timer.metrics()["time/outside_s"] == 0.0


def test_a_phase_entered_again_adds_to_its_time(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    for seconds in (1, 2):
        with timer.phase("sync"):
            clock.now += seconds
    assert timer.seconds == {"sync": 3.0}


def test_a_phase_that_fails_is_timed_and_closed(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)

    def fail() -> None:
        clock.now += 5
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine died"), timer.phase("rollout"):
        fail()
    assert timer.metrics()["time/rollout_s"] == 5.0


def test_metrics_are_refused_while_a_phase_is_open(clock: Clock) -> None:
    timer = PhaseTimer(clock=clock)
    with timer.phase("rollout"), timer.phase("sample"), pytest.raises(RuntimeError, match=r"rollout\.sample is still"):
        timer.metrics()


def test_changes_of_phase_are_announced_by_path(clock: Clock) -> None:
    heard: list[str | None] = []
    timer = PhaseTimer(heard.append, clock)
    with timer.phase("rollout"), timer.phase("sample"):
        pass
    assert heard == ["rollout", "rollout.sample", "rollout", None]


def test_the_default_clock_measures_wall_time() -> None:
    timer = PhaseTimer()
    with timer.phase("update"):
        sum(range(10_000))
    metrics = timer.metrics()
    assert 0 < metrics["time/update_s"] <= metrics["step_time_s"] < 60


Event = tuple[str, float]


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "gap"]), st.floats(0, 1e3)), max_size=20))
def test_for_any_order_of_phases_the_times_add_up(events: list[Event]) -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    advance: Callable[[float], None] = lambda seconds: setattr(clock, "now", clock.now + seconds)  # noqa: E731
    for name, seconds in events:
        if name == "gap":
            advance(seconds)
        else:
            with timer.phase(name):
                advance(seconds)
    metrics = timer.metrics()
    parts = sum(value for key, value in metrics.items() if key.startswith("time/") and key.endswith("_s"))
    assert parts == pytest.approx(metrics["step_time_s"], abs=1e-6)
    assert 0 <= metrics["time/outside_share"] <= 1
