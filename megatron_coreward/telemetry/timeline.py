"""Who was busy when: the intervals of every engine and of the actors, step by step.

RUN/timeline.jsonl holds one line a step, `{"step": 3, "begin": 1.7e9, "end": ..., "lanes": {lane: [[what, begin, end,
sequences], ...]}}`: `begin` and `end` of the step are seconds of `time.time`, those of its intervals are seconds after
the step's begin. Lanes are `actors`, `driver` and `engine 0`, `engine 1` ...; what no interval covers was idle. An
engine that draws ahead has intervals that began before the step, or belong to later ones: a line has what came to be
known in the step. Read by people, never by training.

Invariants (tests/telemetry/test_timeline.py):
  1. A line has at most `MOST_INTERVALS` intervals a lane: neighbours of one kind are merged, the closest ones first.
  2. A step is on disk when `write` returns; opening for `first_step` drops that step and later ones, and a part of a
     line that a kill left.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import append_line, replaced_whole, writing
from megatron_coreward.types import EngineInterval, WeightVersion

FILE_NAME = "timeline.jsonl"
MOST_INTERVALS = 64  # of a lane in a step

ACTORS, DRIVER = "actors", "driver"
# The phases in which the actors compute or send; the others are the driver's, which waits for engines in `rollout`.
ACTOR_PHASES = frozenset({"teacher_ema", "sync", "token_stats", "update", "checkpoint"})


class Interval(NamedTuple):
    """What was done in a lane for a while."""

    what: str  # a phase; of an engine: sample policy, sample teacher, sync policy, sync teacher
    begin: float  # seconds
    end: float
    sequences: float = 0.0  # decoded at once, on average; 0 if that means nothing


@dataclass(frozen=True, slots=True)
class TimelineStep:
    """A line of the file; times are seconds of `time.time`."""

    step: int
    begin: float
    end: float
    lanes: Mapping[str, Sequence[Interval]]


class Timeline:
    """Writes a run's timeline. It hears the phases of the trainer, and is given the engines' intervals."""

    def __init__(self, path: Path, first_step: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Opens the file; `first_step` is the first step that will be written.

        Raises InputError if a whole line of the file is none of a timeline.
        """
        self._path, self._clock = path, clock
        self._phase: tuple[str, float] | None = None  # that is open, and since when
        self._phases: list[Interval] = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = [line for step, line in _numbered_lines(path) if step < first_step]
                with replaced_whole(path) as temporary:
                    temporary.write_bytes(b"".join(line + b"\n" for line in kept))
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._begin = clock()

    def phase(self, path: str | None) -> None:
        """The phase that has begun; None between phases. Fits `PhaseTimer(on_change=...)`."""
        name = None if path is None else path.partition(".")[0]
        if self._phase is not None and self._phase[0] != name:
            self._phases.append(Interval(self._phase[0], self._phase[1], self._clock()))
            self._phase = None
        if name is not None and self._phase is None:
            self._phase = name, self._clock()

    def write(self, step: int, engines: Iterable[EngineInterval]) -> None:
        """Writes what was done since the last step was written."""
        lanes: dict[str, list[Interval]] = {}
        for interval in self._phases:
            lanes.setdefault(ACTORS if interval.what in ACTOR_PHASES else DRIVER, []).append(interval)
        for of_engine in engines:
            what = f"{of_engine.kind} {WeightVersion.of(of_engine.version).role}"
            interval = Interval(what, of_engine.begin, of_engine.end, of_engine.sequences)
            lanes.setdefault(f"engine {of_engine.engine}", []).append(interval)
        begin, end = self._begin, self._clock()
        entry = {
            "step": step,
            "begin": round(begin, 4),
            "end": round(end, 4),
            "lanes": {
                lane: [
                    [i.what, round(i.begin - begin, 4), round(i.end - begin, 4), round(i.sequences, 1)]
                    for i in bounded(intervals)
                ]
                for lane, intervals in sorted(lanes.items(), key=lambda lane: _place(lane[0]))
            },
        }
        with writing(self._path):
            append_line(self._descriptor, json.dumps(entry, separators=(",", ":")).encode() + b"\n", self._path)
        self._phases, self._begin = [], end

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bounded(intervals: Sequence[Interval], most: int = MOST_INTERVALS) -> list[Interval]:
    """At most `most` intervals in order of time. Neighbours of one kind become one, those with the smallest gaps
    between them first; if that is not enough, the longest stay."""
    ordered = sorted(intervals, key=lambda interval: interval.begin)
    surplus = len(ordered) - most
    if surplus > 0:
        gaps = sorted(
            (after.begin - before.end, place)
            for place, (before, after) in enumerate(pairwise(ordered), start=1)
            if before.what == after.what
        )
        joined = {place for _, place in gaps[:surplus]}
        merged: list[Interval] = []
        for place, interval in enumerate(ordered):
            if place in joined:
                merged[-1] = _merge(merged[-1], interval)
            else:
                merged.append(interval)
        ordered = merged
    if len(ordered) > most:
        longest = sorted(ordered, key=lambda interval: interval.begin - interval.end)[:most]
        ordered = sorted(longest, key=lambda interval: interval.begin)
    return ordered


def _merge(a: Interval, b: Interval) -> Interval:
    seconds = (a.end - a.begin) + (b.end - b.begin)
    weighted = a.sequences * (a.end - a.begin) + b.sequences * (b.end - b.begin)
    sequences = weighted / seconds if seconds > 0 else max(a.sequences, b.sequences)
    return Interval(a.what, a.begin, max(a.end, b.end), sequences)


def read_timeline(path: Path) -> list[TimelineStep]:
    """The steps of a timeline, in order; a part of a line at the end is not read. Empty if there is no such file.

    Raises InputError for a whole line that is none of a timeline.
    """
    if not path.is_file():
        return []
    steps = []
    for number, (_, line) in enumerate(_numbered_lines(path), start=1):
        entry = json.loads(line)
        try:
            begin = float(entry["begin"])
            lanes = {
                str(lane): [
                    Interval(str(what), begin + float(since), begin + float(until), float(sequences))
                    for what, since, until, sequences in intervals
                ]
                for lane, intervals in entry["lanes"].items()
            }
            steps.append(TimelineStep(entry["step"], begin, float(entry["end"]), lanes))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: no step of a timeline ({error}); remove the file") from error
    return steps


def _numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    *whole, _part = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append((int(json.loads(line)["step"]), line))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: no step of a timeline ({error}); remove the file") from error
    return lines


def _place(lane: str) -> tuple[int, int]:
    """Actors, driver, then the engines by number."""
    kind, _, number = lane.partition(" ")
    return {ACTORS: 0, DRIVER: 1}.get(kind, 2), int(number) if number.isdigit() else 0
