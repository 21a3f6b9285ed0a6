"""Pictures of runs, drawn from metrics.jsonl: how one run went, and how several methods compare.

A metric that a run does not have is left out, and a panel without any of its metrics with it. A gap (null) stays a gap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.jsonl import FILE_NAME, Row, read_rows

FloatArray64 = NDArray[np.float64]
Scale = Literal["linear", "share", "log"]

# Okabe and Ito's colours, which every colour vision distinguishes.
_BLUE, _ORANGE, _GREEN, _RED, _PINK, _SKY, _YELLOW, _GRAY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#B8A800",
    "#8C8C8C",
)
_COLORS = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, _SKY, _YELLOW, _GRAY)
_PHASE_COLORS = dict(
    zip(
        (*keys.PHASES, keys.OUTSIDE),
        (_PINK, "#7A5195", _ORANGE, "#44AA99", _SKY, _YELLOW, _RED, _GREEN, _BLUE, "#88CCEE", "#44546A", "#CFCFCF"),
        strict=True,
    )
)
_MARKERS = "osD^vP*X"

_SMOOTH_FROM = 40  # points; longer curves are drawn thin, with their moving mean over them


@dataclass(frozen=True, slots=True)
class _PanelPlan:
    title: str
    lines: Sequence[tuple[str, str]]  # key, label
    scale: Scale = "linear"


_PANELS = (
    _PanelPlan(
        "Reward",
        (
            ("reward/mean", "mean"),
            ("reward/std", "standard deviation"),
            ("advantage/zero_variance_share", "groups without variance"),
        ),
    ),
    _PanelPlan(
        "Pseudo-labels",
        (
            ("vote/share", "vote share"),
            ("label/accuracy", "accuracy"),
            ("label/view_agreement", "agreement of views"),
            ("label/teacher_agreement", "agreement with teacher"),
            ("label/flip_rate", "changed since last time"),
        ),
        "share",
    ),
    _PanelPlan("Response length (tokens)", (("rollout/response_tokens_mean", "mean"),)),
    _PanelPlan(
        "Unusable rollouts and votes",
        (
            ("rollout/truncated_share", "cut off at the limit"),
            ("vote/no_answer_rate", "no answer found"),
            ("vote/tie_rate", "tied votes"),
        ),
        "share",
    ),
    _PanelPlan("Policy entropy (nats)", (("rollout/entropy", "mean"),)),
    _PanelPlan("KL to the reference (nats)", (("loss/kl", "mean"),)),
    _PanelPlan("Log-probability gap, engine to actor (nats)", (("sync/logprob_gap", "mean"),), "log"),
)


def draw_run(run_dir: Path, out: Path | None = None) -> Path:
    """One picture of a run: validation, reward, labels, lengths, KL, sync and time. Returns its path.

    The default path is `curves.png` in the run's directory. Raises InputError if the run has no metrics yet.
    """
    rows = _load(run_dir)
    validation = keys.validation_keys(_known(rows))
    plans = [
        _PanelPlan(
            "Validation accuracy", [(key, key.removeprefix("val/")) for key in validation if "@" in key], "share"
        )
    ]
    panels = [plan for plan in (*plans, *_PANELS) if any(key in _known(rows) for key, _ in plan.lines)]
    timed = [row for row in rows if row[keys.STEP] != 0]
    num_panels = len(panels) + bool(timed)
    if num_panels == 0:
        raise InputError(f"{run_dir / FILE_NAME}: no step with metrics to draw has been written yet")
    columns = min(3, num_panels)
    height = ceil(num_panels / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * height + 0.4), layout="constrained")
    figure.suptitle(run_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
    grid = [figure.add_subplot(height, columns, place + 1) for place in range(num_panels)]
    for axes, plan in zip(grid, panels, strict=False):
        _draw_lines(axes, plan, rows)
    if timed:
        _draw_time(grid[-1], timed)
    for axes in grid[-columns:]:
        axes.set_xlabel("step", fontsize=9)
    return _save(figure, out or run_dir / "curves.png")


def draw_comparison(runs: Mapping[str, Path], out: Path, metric: str | None = None) -> Path:
    """Validation accuracy against steps, one curve a run, named as in `runs`: the paper's Figure 1. Returns `out`.

    `metric` defaults to the `val/avg@k` that every run with validation has, of the largest k. Raises InputError if
    there is none; a run that lacks the metric is named in the legend, without a curve.
    """
    if not runs:
        raise InputError("a comparison needs at least one run")
    loaded = {name: _load(run_dir) for name, run_dir in runs.items()}
    metric = metric or _common_average(loaded)
    if not any(metric in _known(rows) for rows in loaded.values()):
        raise InputError(f"none of the runs {', '.join(runs)} has the metric {metric}")
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, rows) in enumerate(loaded.items()):
        steps, values = _series(rows, metric)
        color, marker = _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)]
        if steps.size == 0:
            axes.plot([], [], color=color, marker=marker, label=f"{name}: not measured")
            continue
        axes.plot(
            steps,
            values,
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=1.8,
            label=f"{name}: best {np.nanmax(values):.1%}, last {values[-1]:.1%}",
        )
    _dress(axes, f"Validation accuracy ({metric.removeprefix('val/')})", "share")
    axes.set_xlabel("step", fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return _save(figure, out)


def _load(run_dir: Path) -> list[Row]:
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run directory with metrics is expected")
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path}: no step has been written yet")
    return rows


def _known(rows: Sequence[Row]) -> set[str]:
    """The metrics with a finite value in some row."""
    return {key for row in rows for key, value in row.items() if value is not None}


def _common_average(loaded: Mapping[str, Sequence[Row]]) -> str:
    measured = [{key for key in _known(rows) if key.startswith(("val/avg@", "val/pass@1"))} for rows in loaded.values()]
    with_validation = [found for found in measured if found]
    common = keys.validation_keys(set.intersection(*with_validation)) if with_validation else []
    if not common:
        found = ", ".join(
            f"{name}: {' '.join(sorted(have)) or 'none'}" for name, have in zip(loaded, measured, strict=True)
        )
        raise InputError(f"the runs have no val/avg@k in common ({found})")
    return common[-1]


def _series(rows: Sequence[Row], key: str) -> tuple[FloatArray64, FloatArray64]:
    """Steps and values where the metric was written, a null as NaN; empty if it has no finite value at all."""
    pairs = [(row[keys.STEP], row[key]) for row in rows if key in row]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return (table[:, 0], table[:, 1]) if np.isfinite(table[:, 1]).any() else (np.empty(0), np.empty(0))


def _draw_lines(axes: Axes, plan: _PanelPlan, rows: Sequence[Row]) -> None:
    scale = plan.scale
    for place, (key, label) in enumerate(plan.lines):
        steps, values = _series(rows, key)
        if steps.size == 0:
            continue
        color = _COLORS[place]
        if scale == "log" and not np.nanmin(values) > 0:
            scale = "linear"
        if steps.size >= _SMOOTH_FROM:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _moving_mean(values), color=color, linewidth=1.8, label=label)
        else:
            marker = "o" if steps.size <= 25 else None
            axes.plot(steps, values, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=label)
    _dress(axes, plan.title, scale, legend_columns=3 if len(plan.lines) > 1 else 0)


def _draw_time(axes: Axes, rows: Sequence[Row]) -> None:
    """The step's wall time, stacked by phase: a block a step."""
    steps = np.array([row[keys.STEP] for row in rows], dtype=np.float64)
    phases = {
        phase: np.array([row.get(f"time/{phase}_s") or 0.0 for row in rows]) for phase in (*keys.PHASES, keys.OUTSIDE)
    }
    shown = {phase: seconds for phase, seconds in phases.items() if seconds.any()}
    if not shown:
        shown = {keys.OUTSIDE: np.array([row.get(keys.STEP_TIME) or 0.0 for row in rows])}
    edges = np.column_stack([steps - 0.5, steps + 0.5]).ravel()
    axes.stackplot(
        edges,
        [np.repeat(seconds, 2) for seconds in shown.values()],
        labels=list(shown),
        colors=[_PHASE_COLORS[phase] for phase in shown],
        linewidth=0,
    )
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    _dress(axes, "Time of a step (s)", "linear", legend_columns=5)


def _dress(axes: Axes, title: str, scale: Scale, legend_columns: int = 0) -> None:
    """Axes in the house's style; a legend with `columns` columns between title and plot, none for 0."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if scale == "log":
        axes.set_yscale("log")
    elif scale == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(which="both", labelsize=8)
    legend_rows = 0
    if legend_columns:
        handles, labels = axes.get_legend_handles_labels()
        legend_rows = ceil(len(labels) / legend_columns)
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=legend_columns,
            frameon=False,
            fontsize=7.5,
            handlelength=1.0,
            handletextpad=0.5,
            columnspacing=1.0,
        )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=6 + 13 * max(legend_rows, 1))


def _moving_mean(values: FloatArray64) -> FloatArray64:
    """Centred moving mean over about a twentieth of the curve, less near its ends; NaN counts as absent."""
    num_values = len(values)
    place = np.arange(num_values)
    reach = np.minimum(max(num_values // 40, 1), np.minimum(place, num_values - 1 - place))
    present = np.isfinite(values)

    def window_sum(terms: FloatArray64) -> FloatArray64:
        sums = np.concatenate([[0.0], np.cumsum(terms)])
        window: FloatArray64 = sums[place + reach + 1] - sums[place - reach]
        return window

    total, count = window_sum(np.where(present, values, 0.0)), window_sum(present.astype(np.float64))
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _save(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(out) as temporary:
        figure.savefig(temporary, format="png", dpi=144)
    return out
