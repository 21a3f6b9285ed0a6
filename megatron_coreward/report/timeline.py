"""Who was busy when, as a picture and as a trace: from the records of `telemetry.timeline`."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import replaced_whole, writing
from megatron_coreward.telemetry.timeline import FILE_NAME, Interval, TimelineStep, read_timeline

MAX_LANES = 34  # actors, driver and 32 engines
STEPS = 4  # that a picture shows
_MOST_BARS = 200  # of a lane in a picture

_WIDTH, _LEFT, _LANE, _BAR, _TOP, _BOTTOM = 1100, 84, 18, 13, 6, 24
COLORS = {
    "sample policy": "#56B4E9",
    "sample teacher": "#CC79A7",
    "sync policy": "#E69F00",
    "sync teacher": "#B8A800",
    "update": "#009E73",
    "token_stats": "#6BAF92",
    "teacher_ema": "#7A5195",
    "sync": "#E69F00",
    "rewards": "#D55E00",
    "rollout": "#DADDE1",
    "validation": "#0072B2",
    "checkpoint": "#44546A",
}
_NAMES = {"rollout": "waits for rollouts"}
_OTHER = "#8C8C8C"


def picture(steps: Sequence[TimelineStep]) -> str:
    """The given steps as an SVG, a lane above the other, with a legend. Empty without steps."""
    if not steps:
        return ""
    begin, end = steps[0].begin, max(steps[-1].end, steps[0].begin + 1e-3)
    lanes = _joined(steps)
    shown = list(lanes)[:MAX_LANES]
    height = _TOP + len(shown) * _LANE + _BOTTOM

    def x(time: float) -> float:
        share = (min(max(time, begin), end) - begin) / (end - begin)
        return round(_LEFT + share * (_WIDTH - _LEFT - 4), 1)

    parts = []
    for place, lane in enumerate(shown):
        y = _TOP + place * _LANE
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 10.5}" text-anchor="end">{escape(lane)}</text>')
        for what, since, until, sequences in lanes[lane]:
            if until <= begin or since >= end:
                continue
            width = max(round(x(until) - x(since), 1), 0.3)
            many = f", {sequences:.0f} sequences" if sequences else ""
            title = f"{_NAMES.get(what, what)}: {until - since:.2f} s{many}"
            parts.append(
                f'<rect x="{x(since)}" y="{y}" width="{width}" height="{_BAR}" fill="{COLORS.get(what, _OTHER)}">'
                f"<title>{escape(title)}</title></rect>"
            )
    for step in steps:
        at = x(step.end)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{height - _BOTTOM}"/>')
        middle = (x(step.begin) + at) / 2
        label = f"step {step.step} ({step.end - step.begin:.2f} s)"
        parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{label}</text>')
    used = {interval.what for lane in shown for interval in lanes[lane]}
    legend = "".join(
        f'<span><i style="background:{color}"></i>{escape(_NAMES.get(what, what))}</span>'
        for what, color in COLORS.items()
        if what in used
    )
    more = (
        f'<p class="dim">{len(lanes) - len(shown)} further lanes are in the file.</p>'
        if len(lanes) > len(shown)
        else ""
    )
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
    svg = f'{opening} aria-label="who was busy when">{"".join(parts)}</svg>'
    return f'<div class="legend">{legend}</div><div class="wide">{svg}</div>{more}'


def busy_shares(steps: Sequence[TimelineStep]) -> dict[str, float]:
    """Share of the time of the given steps in which each lane was busy; the driver's waiting is not work."""
    if not steps:
        return {}
    begin, end = steps[0].begin, steps[-1].end
    shares = {}
    for lane, intervals in _joined(steps).items():
        busy, reached = 0.0, begin
        for what, since, until, _ in sorted(intervals, key=lambda interval: interval.begin):
            if what == "rollout":
                continue
            since, until = max(since, reached), min(until, end)
            if until > since:
                busy, reached = busy + until - since, until
        shares[lane] = busy / (end - begin) if end > begin else 0.0
    return shares


def last_steps(run_dir: Path, steps: int = STEPS) -> list[TimelineStep]:
    """The last steps of a run's timeline; empty if it has none."""
    return read_timeline(run_dir / FILE_NAME)[-steps:]


def write_trace(run_dir: Path, out: Path) -> Path:
    """Writes the whole timeline in the Chrome trace format, which chrome://tracing and Perfetto open. Returns its path.

    Raises InputError if the run has no timeline.
    """
    steps = read_timeline(run_dir / FILE_NAME)
    if not steps:
        raise InputError(f"{run_dir / FILE_NAME}: no steps; a run writes a line of it for every step")
    with writing(out), replaced_whole(out) as temporary:
        temporary.write_text(json.dumps({"traceEvents": _events(steps), "displayTimeUnit": "ms"}), encoding="utf-8")
    return out


def _events(steps: Sequence[TimelineStep]) -> list[dict[str, Any]]:
    zero = min([steps[0].begin, *(i.begin for lane in steps[0].lanes.values() for i in lane)])
    threads = {lane: number for number, lane in enumerate(["steps", *_joined(steps)])}

    def event(lane: str, name: str, begin: float, end: float, **more: object) -> dict[str, Any]:
        at, duration = round(1e6 * (begin - zero)), max(round(1e6 * (end - begin)), 0)
        return {"ph": "X", "pid": 1, "tid": threads[lane], "name": name, "ts": at, "dur": duration, "args": more}

    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}}
        for lane, number in threads.items()
    ]
    for step in steps:
        events.append(event("steps", f"step {step.step}", step.begin, step.end))
        for lane, intervals in step.lanes.items():
            for what, since, until, sequences in intervals:
                events.append(event(lane, what, since, until, step=step.step, sequences=sequences))
    return events


def _joined(steps: Sequence[TimelineStep]) -> dict[str, list[Interval]]:
    """The intervals of all steps by lane; the driver's and the actors' lanes first."""
    lanes: dict[str, list[Interval]] = {}
    for step in steps:
        for lane, intervals in step.lanes.items():
            lanes.setdefault(lane, []).extend(intervals)
    return lanes
