"""Charts show the numbers they are given, inside their frame, whatever the numbers are."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.report.chart import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Line,
    Mark,
    Scale,
    format_value,
    line_chart,
    moving_mean,
    share_chart,
    thin,
)

numbers = st.one_of(st.none(), st.floats(-1e12, 1e12), st.floats(0, 1))
series = st.lists(numbers, min_size=1, max_size=60).map(lambda values: list(enumerate(values)))


@given(st.lists(series, min_size=1, max_size=3), st.sampled_from(["linear", "share", "log"]))
def test_every_line_stays_inside_the_chart(many: list[list[tuple[int, float | None]]], scale: Scale) -> None:
    lines = [Line(f"line {place}", "#000000", points) for place, points in enumerate(many)]
    if not any(value is not None for points in many for _, value in points):
        with pytest.raises(ValueError, match="nothing to draw"):
            line_chart("title", lines, scale)
        return
    chart = line_chart("title", lines, scale)
    for path in re.findall(r' d="([^"]*)"', chart.svg):
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT
    assert "nan" not in chart.svg
    assert "inf" not in chart.svg
    for line, points in zip(chart.readout["lines"], many, strict=True):
        known = [(step, value) for step, value in points if value is not None]
        assert line["at"] == [step for step, _ in known]
        assert len(line["shown"]) == len(known)


@pytest.mark.parametrize("scale", ["linear", "share", "log"])
@pytest.mark.parametrize("values", [[5e-324], [0.0, 5e-324], [-1e-320, 1e-310], [1e-310, 1.0], [0.0, 1e-20]])
def test_numbers_next_to_zero_are_drawn(scale: Scale, values: list[float]) -> None:
    chart = line_chart("title", [Line("a", "#000000", list(enumerate(values)))], scale)
    heights = [float(y) for y in re.findall(r' cy="(-?[\d.]+)"', chart.svg)]
    assert len(heights) == len(values)
    assert all(0 <= y <= HEIGHT for y in heights)


def test_a_gap_stays_a_gap_and_the_range_can_be_given() -> None:
    chart = line_chart("t", [Line("a", "#000000", [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)])], steps=(0, 8))
    (path,) = re.findall(r'class="line" d="([^"]*)"', chart.svg)
    assert path.count("M") == 2
    assert chart.readout["steps"] == [0, 8]


def test_marks_stand_at_their_steps() -> None:
    chart = line_chart("t", [Line("a", "#000000", [(0, 1.0), (10, 2.0)])], marks=[Mark(10, "act"), Mark(0, "warn")])
    (last,) = re.findall(r'class="mark act" x1="([\d.]+)"', chart.svg)
    (first,) = re.findall(r'class="mark warn" x1="([\d.]+)"', chart.svg)
    assert [float(first), float(last)] == chart.readout["edges"]


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=1, max_size=30))
def test_stacked_shares_add_up_to_one(rows: list[list[float]]) -> None:
    layers = [
        Line(f"layer {place}", "#000000", [(step, row[place]) for step, row in enumerate(rows)]) for place in range(3)
    ]
    if not any(sum(row) for row in rows):
        with pytest.raises(ValueError, match="nothing to draw"):
            share_chart("t", layers)
        return
    shown = [line["shown"] for line in share_chart("t", layers).readout["lines"]]
    for parts in zip(*shown, strict=True):
        assert sum(float(part.rstrip("%")) for part in parts) == pytest.approx(100, abs=0.2)


@given(st.integers(1, 5 * MAX_POINTS))
def test_long_lines_are_thinned_without_losing_their_mean_or_their_end(length: int) -> None:
    points = [(step, float(step % 7)) for step in range(length)]
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS
    assert thinned[-1][0] == length - 1
    if length <= MAX_POINTS:
        assert thinned == points
    elif length % len(thinned) == 0:
        mean = math.fsum(value for _, value in thinned if value is not None) / len(thinned)
        assert mean == pytest.approx(math.fsum(value for _, value in points) / length)


@given(st.lists(numbers, min_size=1, max_size=120))
def test_smoothing_keeps_gaps_and_stays_between_the_extremes(values: list[float | None]) -> None:
    smooth = moving_mean(list(enumerate(values)))
    known = [value for value in values if value is not None]
    for (_, found), value in zip(smooth, values, strict=True):
        assert (found is None) == (value is None)
        if found is not None:
            slack = 1e-9 * max(abs(min(known)), abs(max(known)), 1e-300)
            assert min(known) - slack <= found <= max(known) + slack


@pytest.mark.parametrize(
    ("value", "scale", "shown"),
    [(0.12345, "share", "12.3%"), (0.000123456, "linear", "0.000123"), (5e-7, "log", "5e-07")],
)
def test_numbers_for_people(value: float, scale: Scale, shown: str) -> None:
    assert format_value(value, scale) == shown


def test_a_line_of_zeros_lies_on_the_floor_of_an_axis_without_negative_numbers() -> None:
    chart = line_chart("title", [Line("alarms", "#000000", [(1, 0.0), (2, 0.0)])])
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert {"0", "1"} <= set(labels)
    assert not any(label.startswith("-") for label in labels)
