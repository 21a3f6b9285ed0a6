"""Which curves a report shows, in which order, and what each one says."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_coreward.report.chart import Chart, Line, Mark, Points, Scale, line_chart, share_chart
from megatron_coreward.report.question_states import State
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.jsonl import Row

# Okabe and Ito's colours, which every colour vision distinguishes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#B8A800", "#8C8C8C")
STATE_COLORS: Mapping[State, str] = {
    "learned": "#009E73",
    "sharpened": "#56B4E9",
    "weakened": "#0072B2",
    "unsettled": "#B8A800",
    "locked": "#E69F00",
    "corrupted": "#D55E00",
}
PHASE_COLORS = {
    "teacher_ema": "#CC79A7",
    "switch": "#332288",
    "sync": "#E69F00",
    "rephrasing": "#44AA99",
    "rollout": "#56B4E9",
    "token_stats": "#B8A800",
    "rewards": "#D55E00",
    "update": "#009E73",
    "validation": "#0072B2",
    "anchors": "#88CCEE",
    "checkpoint": "#44546A",
    "rollout_log": "#7A5195",
    keys.OUTSIDE: "#BDBDBD",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its lines are metrics, each with its label."""

    title: str
    lines: Sequence[tuple[str, str]]
    scale: Scale = "linear"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A panel with its chart and the legend (name, colour), empty if the title says it all."""

    title: str
    chart: Chart
    legend: list[tuple[str, str]]


PANELS: tuple[Panel, ...] = (
    Panel(
        "Reward",
        (("reward/mean", "mean"), ("reward/std", "std"), ("advantage/zero_variance_share", "groups without variance")),
    ),
    Panel(
        "Votes",
        (("vote/share", "vote share"), ("vote/margin", "margin"), ("teacher_vote/share", "teacher's vote share")),
        "share",
    ),
    Panel(
        "Label quality (read by nobody in training)",
        (
            ("label/accuracy", "labels that are right"),
            ("rollout/accuracy", "rollouts that are right"),
            ("reward/accuracy", "rollouts rewarded rightly"),
        ),
        "share",
    ),
    Panel(
        "Stability of labels",
        (
            ("label/flip_rate", "changed since last time"),
            ("label/view_agreement", "views agree"),
            ("label/teacher_agreement", "teacher agrees"),
            ("vote/label_variety", "distinct labels"),
            ("anchor/kept", "anchors kept"),
        ),
        "share",
    ),
    Panel(
        "Distinct answers a group", (("vote/distinct_answers", "policy"), ("teacher_vote/distinct_answers", "teacher"))
    ),
    Panel(
        "Response length (tokens)",
        (("rollout/response_tokens_mean", "mean"), ("rollout/response_tokens_max", "longest")),
    ),
    Panel(
        "Unusable rollouts and votes",
        (
            ("vote/no_answer_rate", "no answer"),
            ("rollout/truncated_share", "cut off"),
            ("vote/tie_rate", "tied votes"),
            ("label/missing_rate", "no label"),
        ),
        "share",
    ),
    Panel("Entropy of the policy (nats)", (("rollout/entropy", "mean"),)),
    Panel("KL to the reference (nats a token)", (("loss/kl", "mean"),)),
    Panel("Gradient norm", (("optim/grad_norm", "before clipping"),)),
    Panel("Learning rate", (("optim/lr", "rate"),)),
    Panel("Teacher decay", (("teacher/decay", "d(k)"),)),
    Panel(
        "Gap between engines and actors (nats)",
        (("sync/logprob_gap", "mean"), ("sync/logprob_gap_max", "largest"), ("sync/canary_gap", "canary")),
        "log",
    ),
    Panel("Time of a step (s)", ((keys.STEP_TIME, "whole step"),)),
    Panel("Indicators of collapse", (("guard/indicators", "indicators"), ("guard/level", "level"))),
)


def validation_panel(known: Iterable[str]) -> Panel:
    """Held-out accuracy, for the k that a run has."""
    names = [key for key in keys.validation_keys(known) if "@" in key]
    return Panel("Accuracy on held-out questions", [(key, key.removeprefix("val/")) for key in names], "share")


def draw(panel: Panel, rows: Sequence[Row], marks: Sequence[Mark] = ()) -> Drawn | None:
    """A panel of one run; None if the run has none of its metrics."""
    lines = [
        Line(label, COLORS[place % len(COLORS)], points)
        for place, (key, label) in enumerate(panel.lines)
        if _has_value(points := points_of(rows, key))
    ]
    if not lines:
        return None
    chart = line_chart(panel.title, lines, panel.scale, marks, _span(rows))
    # Where one of several is left, its name still says what is drawn.
    legend = [(line.name, line.color) for line in lines] if len(panel.lines) > 1 else []
    return Drawn(panel.title, chart, legend)


def draw_runs(title: str, key: str, runs: Sequence[tuple[str, Sequence[Row]]], scale: Scale) -> Drawn | None:
    """One metric of several runs, each in the colour of its place; None if no run has it."""
    lines = [
        Line(name, COLORS[place % len(COLORS)], points, dashed=place >= len(COLORS))
        for place, (name, rows) in enumerate(runs)
        if _has_value(points := points_of(rows, key))
    ]
    if not lines:
        return None
    span = _span([row for _, rows in runs for row in rows])
    return Drawn(title, line_chart(title, lines, scale, steps=span), [(line.name, line.color) for line in lines])


def draw_time(rows: Sequence[Row]) -> Drawn | None:
    """Where the time of the steps goes, as shares; None if nothing was timed."""
    timed = [row for row in rows if row[keys.STEP] != 0 and row.get(keys.STEP_TIME)]
    found = {key for row in timed for key in row if key.startswith("time/") and key.endswith("_s") and "." not in key}
    phases = [key.removeprefix("time/").removesuffix("_s") for key in found]
    order = [*PHASE_COLORS, *sorted(set(phases) - set(PHASE_COLORS))]
    layers = [
        Line(
            phase.replace("_", " "),
            PHASE_COLORS.get(phase, "#888888"),
            [(int(row[keys.STEP] or 0), row.get(f"time/{phase}_s") or 0.0) for row in timed],
        )
        for phase in order
        if phase in phases
    ]
    if not any(_has_value([point for point in layer.points if point[1]]) for layer in layers):
        return None
    title = "Where the time of a step goes"
    return Drawn(title, share_chart(title, layers), [(layer.name, layer.color) for layer in layers])


def draw_states(states: Sequence[tuple[int, Mapping[State, int]]]) -> Drawn | None:
    """What became of the labels of the questions seen twice or more, as shares of them; None if there are none."""
    if not states:
        return None
    layers = [
        Line(name, color, [(step, float(count[name])) for step, count in states])
        for name, color in STATE_COLORS.items()
    ]
    title = "What became of each question's label"
    return Drawn(title, share_chart(title, layers), [(layer.name, layer.color) for layer in layers])


def points_of(rows: Sequence[Row], key: str) -> Points:
    """Steps and values of a metric where it was written; a null is a gap.

    The time of a step leaves out step 0, which only validates.
    """
    return [
        (int(row[keys.STEP] or 0), row[key])
        for row in rows
        if key in row and not (key == keys.STEP_TIME and row[keys.STEP] == 0)
    ]


def _span(rows: Sequence[Row]) -> tuple[int, int]:
    steps = [int(row[keys.STEP] or 0) for row in rows]
    return min(steps), max(steps)


def _has_value(points: Points) -> bool:
    return any(value is not None for _, value in points)
