"""A timeline has what every lane did in each step, bounded, and goes on after a kill as the run does."""

import json
from pathlib import Path

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.timeline import MOST_INTERVALS, Interval, Timeline, bounded, read_timeline
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.types import EngineInterval


class Clock:
    """Stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_step_has_the_trainers_phases_and_what_each_engine_did(tmp_path: Path) -> None:
    clock = Clock()
    with Timeline(tmp_path / "timeline.jsonl", clock=clock) as timeline:
        timer = PhaseTimer(timeline.phase)
        with timer.phase("rollout"):
            clock.now = 1002.0
        clock.now = 1003.0
        with timer.phase("update"), timer.phase("inner"):
            clock.now = 1005.0
        sampled = EngineInterval(1, "sample", 6, 1000.5, 1001.5, 4.0)
        received = EngineInterval(0, "sync", 7, 1000.0, 1000.25)
        timeline.write(1, [sampled, received])
        clock.now = 1006.0
        timeline.write(2, [])
    first, second = read_timeline(tmp_path / "timeline.jsonl")
    assert (first.step, first.begin, first.end) == (1, 1000.0, 1005.0)
    assert first.lanes == {
        "actors": [Interval("update", 1003.0, 1005.0)],
        "driver": [Interval("rollout", 1000.0, 1002.0)],
        "engine 0": [Interval("sync teacher", 1000.0, 1000.25)],
        "engine 1": [Interval("sample policy", 1000.5, 1001.5, 4.0)],
    }
    assert list(first.lanes) == ["actors", "driver", "engine 0", "engine 1"]
    assert (second.begin, second.end, second.lanes) == (1005.0, 1006.0, {})


def test_lanes_are_bounded_by_merging_the_closest_neighbours_of_one_kind() -> None:
    close = [Interval("sample policy", i, i + 0.9, 2.0) for i in range(5)]
    far = Interval("sample policy", 10, 11, 8.0)
    assert bounded([far, *close], most=2) == [Interval("sample policy", 0, 4.9, 2.0), far]
    weights = bounded([Interval("a", 0, 1, 1.0), Interval("a", 1, 4, 5.0)], most=1)
    assert weights == [Interval("a", 0, 4, 4.0)]


def test_the_longest_stay_if_neighbours_are_of_different_kinds(tmp_path: Path) -> None:
    mixed = [Interval("ab"[i % 2], i, i + (0.5 if i == 3 else 0.1)) for i in range(6)]
    assert bounded(mixed, most=1) == [mixed[3]]
    with Timeline(tmp_path / "timeline.jsonl") as timeline:
        timeline.write(1, [EngineInterval(0, "sample", i % 2, i, i + 0.5) for i in range(1000)])
    (step,) = read_timeline(tmp_path / "timeline.jsonl")
    assert len(step.lanes["engine 0"]) == MOST_INTERVALS


def test_a_resumed_run_writes_its_steps_again_and_drops_a_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    with Timeline(path) as timeline:
        for step in (1, 2, 3):
            timeline.write(step, [])
    path.write_bytes(path.read_bytes() + b'{"step": 4, "beg')
    assert [entry.step for entry in read_timeline(path)] == [1, 2, 3]
    with Timeline(path, first_step=3) as timeline:
        timeline.write(3, [])
    assert [entry.step for entry in read_timeline(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["no json", '{"begin": 1}', '{"step": 1, "lanes": {"actors": [[1]]}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "timeline.jsonl"
    path.write_text(json.dumps({"step": 1, "begin": 1.0, "end": 2.0, "lanes": {}}) + f"\n{line}\n")
    with pytest.raises(InputError, match=r"timeline\.jsonl, line 2"):
        read_timeline(path)
    assert read_timeline(tmp_path / "none.jsonl") == []
