"""Bands go from the lowest to the highest seed, and long curves are smoothed before."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_coreward.telemetry import bands
from megatron_coreward.telemetry.bands import COLORS, Panel, draw_bands


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    made: list[Figure] = []

    def remember(**settings: object) -> Figure:
        made.append(Figure(**settings))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(bands, "Figure", remember)
    return made


def test_the_line_is_the_mean_of_the_seeds_and_the_band_their_range(tmp_path: Path, figures: list[Figure]) -> None:
    seeds = [{0: 1.0, 10: 2.0}, {0: 3.0, 10: 6.0}, {0: 2.0}]  # the last one was cut off
    picture = draw_bands([[Panel("a", {"first": [], "second": seeds})]], tmp_path / "a.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    (line,) = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 10], [2.0, 4.0])
    assert line.get_color() == COLORS[1]  # of its place, whether the first has a curve or not
    corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    assert {(0.0, 1.0), (0.0, 3.0), (10.0, 2.0), (10.0, 6.0)} <= corners
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["second"]


def test_one_seed_has_no_band(tmp_path: Path, figures: list[Figure]) -> None:
    draw_bands([[Panel("a", {"only": [{0: 1.0, 1: 2.0}]})]], tmp_path / "a.png")
    assert len(figures[0].axes[0].collections) == 0


def test_long_curves_are_means_of_their_neighbourhood(tmp_path: Path, figures: list[Figure]) -> None:
    spike = {step: float(step == 100) for step in range(200)}
    draw_bands([[Panel("a", {"only": [spike]})]], tmp_path / "a.png")
    values = list(figures[0].axes[0].lines[0].get_ydata())
    assert values[100] == pytest.approx(1 / 11)
    assert (values[94], values[95], values[105], values[106]) == (0, values[100], values[100], 0)
