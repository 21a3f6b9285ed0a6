"""Pictures of runs that were repeated with several seeds: the mean over the seeds, and the band between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_coreward.telemetry.files import replaced_whole

# Okabe and Ito's colours, which every colour vision distinguishes.
COLORS = ("#8C8C8C", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800")
_MARKED = 8  # points; shorter curves show each of them
_LEAST_ON_LOG = 1e-6  # what is less is rounding, such as the KL between a model and its copy
_SMOOTHED = 40  # points; longer curves are shown as means over a twentieth of them

Scale = Literal["linear", "share", "log"]
Series = Mapping[float, float]  # place on the horizontal axis -> value


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: for each name the series of its seeds."""

    title: str
    lines: Mapping[str, Sequence[Series]]
    scale: Scale = "linear"


def draw_bands(panels: Sequence[Sequence[Panel]], out: Path, xlabel: str = "step", legend_columns: int = 4) -> Path:
    """Rows of charts with one legend for all; a name has the same colour everywhere. Returns `out`.

    The line is the mean over the seeds that have a value at a place, the band goes from the lowest to the highest.
    """
    names = list(dict.fromkeys(name for row in panels for panel in row for name in panel.lines))
    colors = {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}
    columns = max(map(len, panels))
    figure = Figure(figsize=(3.5 * columns, 2.6 * len(panels) + 0.7), layout="constrained")
    handles: dict[str, Any] = {}
    for place, row in enumerate(panels):
        for column, panel in enumerate(row):
            axes = figure.add_subplot(len(panels), columns, place * columns + column + 1)
            handles |= _draw(axes, panel, colors)
            if place == len(panels) - 1:
                axes.set_xlabel(xlabel, fontsize=8)
    figure.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=8,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return out


def _draw(axes: Axes, panel: Panel, colors: Mapping[str, str]) -> dict[str, Any]:
    handles = {}
    for name, seeds in panel.lines.items():
        smooth = [_smoothed(series) for series in seeds if series]
        places = sorted({place for series in smooth for place in series})
        if not places:
            continue
        values = [[series[place] for series in smooth if place in series] for place in places]
        means = [float(np.mean(at)) for at in values]
        marker = "o" if len(places) <= _MARKED else None
        (handles[name],) = axes.plot(places, means, color=colors[name], linewidth=1.6, marker=marker, markersize=4)
        if len(smooth) > 1:
            low, high = [min(at) for at in values], [max(at) for at in values]
            axes.fill_between(places, low, high, color=colors[name], alpha=0.2, linewidth=0)
    axes.set_title(panel.title, loc="left", fontsize=9, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=7)
    if panel.scale == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif panel.scale == "log":
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST_ON_LOG))
    return handles


def _smoothed(series: Series) -> Series:
    """Means over the neighbours of each place, in curves of many points."""
    if len(series) < _SMOOTHED:
        return series
    places = sorted(series)
    reach = len(places) // 40
    values = np.asarray([series[place] for place in places])
    return {place: float(values[max(0, at - reach) : at + reach + 1].mean()) for at, place in enumerate(places)}
