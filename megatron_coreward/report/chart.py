"""Charts as inline SVG: lines over steps, and stacked shares. Numbers in, markup out.

A chart is drawn in its own coordinates (WIDTH x HEIGHT) and scales with the page. Colours of lines are given;
everything else takes the page's colours. What a reader needs to look up values is returned beside the markup, as plain
JSON.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any, Literal

Scale = Literal["linear", "share", "log"]
Points = Sequence[tuple[int, float | None]]  # step, value; None is a gap

WIDTH, HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26
MAX_POINTS = 500  # a line; longer ones are drawn as means of neighbours
_SMOOTH_FROM = 40  # points; longer lines are drawn thin, with their moving mean over them
_DOTS_UP_TO = 25
_LEAST = 1e-300  # a range: below 1e-308 floating-point numbers lose digits, and quotients become 0


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    color: str
    points: Points
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at a step."""

    step: int
    kind: Literal["warn", "act"]


@dataclass(frozen=True, slots=True)
class Chart:
    """Markup, and what the pointer reads from it."""

    svg: str
    readout: dict[str, Any]  # plot edges, range of steps, and the values of each line


def line_chart(
    title: str,
    lines: Sequence[Line],
    scale: Scale = "linear",
    marks: Sequence[Mark] = (),
    steps: tuple[int, int] | None = None,
) -> Chart:
    """Lines over steps, from the first to the last of `steps` or as far as the lines go.

    Raises ValueError if no line has a value.
    """
    drawn = [Line(line.name, line.color, thin(line.points), line.dashed) for line in lines]
    values = [value for line in drawn for _, value in line.points if value is not None]
    if not values:
        raise ValueError(f"chart {title!r}: nothing to draw")
    if scale == "log" and min(values) < _LEAST:
        scale = "linear"
    first, last = steps or _step_range(drawn)
    axis = _Axis.of(values, scale)
    parts = [_frame(axis, first, last)]
    for mark in marks:
        x = _x(mark.step, first, last)
        parts.append(f'<line class="mark {mark.kind}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    for line in drawn:
        style = f'stroke="{line.color}"' + (' stroke-dasharray="5 3"' if line.dashed else "")
        known = sum(value is not None for _, value in line.points)
        if known >= _SMOOTH_FROM:
            parts.append(f'<path class="raw" d="{_path(line.points, axis, first, last)}" {style}/>')
            parts.append(f'<path class="line" d="{_path(moving_mean(line.points), axis, first, last)}" {style}/>')
            continue
        parts.append(f'<path class="line" d="{_path(line.points, axis, first, last)}" {style}/>')
        if known <= _DOTS_UP_TO:
            parts += [
                f'<circle cx="{_x(step, first, last)}" cy="{axis.y(value)}" r="2.4" fill="{line.color}"/>'
                for step, value in line.points
                if value is not None
            ]
    return _chart(title, parts, drawn, scale, first, last)


def share_chart(title: str, layers: Sequence[Line]) -> Chart:
    """Layers that are stacked and add up to everything: each point is a layer's share of the whole of its step.

    The layers have the same steps. Raises ValueError if there is nothing to share.
    """
    thinned = [Line(layer.name, layer.color, thin(layer.points)) for layer in layers]
    steps = [step for step, _ in thinned[0].points] if thinned else []
    totals = [sum(layer.points[place][1] or 0.0 for layer in thinned) for place in range(len(steps))]
    if not any(totals):
        raise ValueError(f"chart {title!r}: nothing to draw")
    shares = [
        Line(
            layer.name,
            layer.color,
            [
                (step, (value or 0.0) / total if total else None)
                for (step, value), total in zip(layer.points, totals, strict=True)
            ],
        )
        for layer in thinned
    ]
    first, last = steps[0], steps[-1]
    axis = _Axis.of([0.0, 1.0], "share")
    parts = []
    floor = [0.0] * len(steps)
    for layer in shares:
        top = [low + (value or 0.0) for low, (_, value) in zip(floor, layer.points, strict=True)]
        edges = [(_x(s, first, last), axis.y(t)) for s, t in zip(steps, top, strict=True)]
        edges += [(_x(s, first, last), axis.y(low)) for s, low in zip(reversed(steps), reversed(floor), strict=True)]
        if len(steps) == 1:  # a single step fills the width
            right = WIDTH - _RIGHT
            edges = [
                (_LEFT, axis.y(top[0])),
                (right, axis.y(top[0])),
                (right, axis.y(floor[0])),
                (_LEFT, axis.y(floor[0])),
            ]
        parts.append(f'<polygon fill="{layer.color}" points="{" ".join(f"{x},{y}" for x, y in edges)}"/>')
        floor = top
    parts.append(_frame(axis, first, last))
    return _chart(title, parts, shares, "share", first, last)


def thin(points: Points) -> list[tuple[int, float | None]]:
    """At most MAX_POINTS points: each the mean of as many neighbours, at the step of the last of them."""
    size = -(-len(points) // MAX_POINTS) or 1
    if size == 1:
        return list(points)
    result: list[tuple[int, float | None]] = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        known = [value for _, value in part if value is not None]
        result.append((part[-1][0], math.fsum(known) / len(known) if known else None))
    return result


def moving_mean(points: Points) -> list[tuple[int, float | None]]:
    """Centred mean over about a twentieth of the line, less near its ends; gaps count as absent and stay gaps."""
    reach = max(len(points) // 40, 1)
    result: list[tuple[int, float | None]] = []
    for place, (step, value) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        known = [v for _, v in points[place - near : place + near + 1] if v is not None]
        result.append((step, math.fsum(known) / len(known) if known and value is not None else None))
    return result


def format_value(value: float, scale: Scale) -> str:
    """A number for people: a percentage, or three significant digits."""
    return f"{value:.1%}" if scale == "share" else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """The vertical scale of a chart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    scale: Scale

    @classmethod
    def of(cls, values: Sequence[float], scale: Scale) -> "_Axis":
        low, high = min(values), max(values)
        if scale == "log":
            bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
            top = max(top, bottom + 1)
            every = -(-(top - bottom) // 5)
            return cls(10.0**bottom, 10.0**top, tuple(10.0**e for e in range(bottom, top + 1, every)), scale)
        if 0 <= low < 0.5 * high:
            low = 0.0
        if low == high == 0.0:
            high = 1.0
        if high - low <= 1e-9 * max(abs(high), abs(low), 1e-9):
            slack = 0.05 * max(abs(high), abs(low), _LEAST)
            high, low = high + slack, low - slack
        step = _nice((high - low) / 4)
        bottom, top = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(bottom * step, top * step, tuple(n * step for n in range(bottom, top + 1)), scale)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.scale == "log":
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = (value - low) / (high - low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def label(self, value: float) -> str:
        if self.scale == "share":
            return f"{100 * value:.4g}%"
        if value == 0 or (1e-4 <= abs(value) < 1e6 and self.scale != "log"):
            return f"{value:.4g}"
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"


def _nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))


def _x(step: float, first: int, last: int) -> float:
    share = (step - first) / (last - first) if last > first else 0.5
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)


def _step_range(lines: Sequence[Line]) -> tuple[int, int]:
    steps = [step for line in lines for step, _ in line.points]
    return min(steps), max(steps)


def _path(points: Points, axis: _Axis, first: int, last: int) -> str:
    pieces = []
    for present, part in groupby(points, key=lambda point: point[1] is not None):
        if present:
            at = [f"{_x(step, first, last)},{axis.y(value)}" for step, value in part if value is not None]
            pieces.append("M" + "L".join(at if len(at) > 1 else [at[0], at[0]]))
    return "".join(pieces)


def _frame(axis: _Axis, first: int, last: int) -> str:
    lines = []
    for tick in axis.ticks:
        y = axis.y(tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{axis.label(tick)}</text>')
    every = max(1, round(_nice(max(last - first, 1) / 6)))
    for step in range(-(-first // every) * every, last + 1, every):
        lines.append(f'<text x="{_x(step, first, last)}" y="{HEIGHT - 8}" text-anchor="middle">{step}</text>')
    return "".join(lines)


def _chart(title: str, parts: Sequence[str], lines: Sequence[Line], scale: Scale, first: int, last: int) -> Chart:
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}'
        f'<line class="cursor" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" visibility="hidden"/></svg>'
    )
    readout = {
        "edges": [_LEFT, WIDTH - _RIGHT],
        "steps": [first, last],
        "lines": [
            {
                "name": line.name,
                "color": line.color,
                "at": [step for step, value in line.points if value is not None],
                "shown": [format_value(value, scale) for _, value in line.points if value is not None],
            }
            for line in lines
        ],
    }
    return Chart(svg, readout)
