"""`compare`: several runs on one page, their curves over each other and their ends in a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_coreward.config.methods import method_title
from megatron_coreward.errors import InputError
from megatron_coreward.report import panels
from megatron_coreward.report.chart import Scale
from megatron_coreward.report.html_page import figures, readouts, section, table, text, write_page
from megatron_coreward.report.panels import COLORS, Drawn
from megatron_coreward.report.run_record import RunRecord, load_record
from megatron_coreward.telemetry import keys

# One chart each, after validation.
METRICS: tuple[tuple[str, str, Scale], ...] = (
    ("reward/mean", "Reward", "linear"),
    ("vote/share", "Vote share", "share"),
    ("label/accuracy", "Labels that are right", "share"),
    ("label/flip_rate", "Labels changed since last time", "share"),
    ("vote/distinct_answers", "Distinct answers a group", "linear"),
    ("vote/no_answer_rate", "Rollouts without an answer", "share"),
    ("rollout/response_tokens_mean", "Response length (tokens)", "linear"),
    ("rollout/entropy", "Entropy of the policy (nats)", "linear"),
    ("loss/kl", "KL to the reference (nats a token)", "linear"),
    ("optim/grad_norm", "Gradient norm", "linear"),
    ("teacher/decay", "Teacher decay", "linear"),
    ("sync/logprob_gap", "Gap between engines and actors (nats)", "log"),
    (keys.STEP_TIME, "Time of a step (s)", "linear"),
    ("guard/indicators", "Indicators of collapse", "linear"),
)


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes the page of several runs. Returns its path.

    Raises InputError for fewer than two runs, or if one of the directories is none.
    """
    if len(run_dirs) < 2:
        raise InputError(f"a comparison needs at least two run directories, found {len(run_dirs)}")
    records = [load_record(run_dir) for run_dir in run_dirs]
    runs = list(zip(_names(records), records, strict=True))
    known = set().union(*(record.known_keys() for record in records))
    accuracy = [key for key in keys.validation_keys(known) if "@" in key]
    charts: list[tuple[str, str, Scale]] = [(key, f"Held-out {key.removeprefix('val/')}", "share") for key in accuracy]
    pairs = [(name, record.rows) for name, record in runs]
    drawn = [
        item
        for key, title, scale in (*charts, *METRICS)
        if (item := panels.draw_runs(title, key, pairs, scale)) is not None
    ]
    time = [_named(item, name) for name, rows in pairs if (item := panels.draw_time(rows)) is not None]
    sections = [
        '<nav><a href="#ends">Ends</a><a href="#curves">Curves</a><a href="#time">Time</a>'
        f'<a href="#differences">Differences</a></nav><h1>{len(runs)} runs</h1>',
        section("ends", "Where they end", _ends(runs, accuracy)),
        section("curves", "Curves", figures(drawn)),
        section("time", "Where the time of a step goes", figures(time, start=len(drawn))),
        section("differences", "Settings that differ", _differences(runs)),
    ]
    write_page(out, f"{len(runs)} runs", sections, {"charts": readouts([*drawn, *time]), "samples": []})
    return out


def _ends(runs: Sequence[tuple[str, RunRecord]], accuracy: Sequence[str]) -> str:
    head = ["run", "method", "steps", *(key.removeprefix("val/") for key in accuracy)]
    head += ["best", "vote share", "label accuracy", "KL", "tokens", "s a step"]
    rows = []
    for place, (name, record) in enumerate(runs):
        ends = [_first_to_last(record, key) for key in accuracy]
        known = [key for key in accuracy if key in record.known_keys()]
        best_of = next((key for key in known if "avg@" in key), known[0] if known else None)  # pass@1 of greedy runs
        rows.append(
            [
                f'<span style="color:{COLORS[place % len(COLORS)]}">■</span> {text(name)}',
                text(method_title(record.config.get("method", ""))),
                str(int(record.rows[-1][keys.STEP] or 0)),
                *ends,
                _best(record, best_of) if best_of else "",
                _last(record, "vote/share", "{:.1%}"),
                _last(record, "label/accuracy", "{:.1%}"),
                _last(record, "loss/kl", "{:.3g}"),
                _last(record, "rollout/response_tokens_mean", "{:.0f}"),
                _mean_time(record),
            ]
        )
    return table(head, rows, numeric=range(2, len(head)))


def _first_to_last(record: RunRecord, key: str) -> str:
    values = _values(record, key)
    return f"{values[0]:.1%} → {values[-1]:.1%}" if values else ""


def _best(record: RunRecord, key: str) -> str:
    step, value = max(
        ((int(row[keys.STEP] or 0), value) for row in record.rows if (value := row.get(key)) is not None),
        key=lambda pair: pair[1],
    )
    return f"{value:.1%} at {step}"


def _last(record: RunRecord, key: str, form: str) -> str:
    values = _values(record, key)
    return form.format(values[-1]) if values else ""


def _mean_time(record: RunRecord) -> str:
    seconds = [value for row in record.steps if (value := row.get(keys.STEP_TIME)) is not None]
    return f"{sum(seconds) / len(seconds):.3g}" if seconds else ""


def _values(record: RunRecord, key: str) -> list[float]:
    return [value for row in record.rows if (value := row.get(key)) is not None]


def _differences(runs: Sequence[tuple[str, RunRecord]]) -> str:
    flat = [_flatten(record.config) for _, record in runs]
    names = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [
        [text(key), *(text(settings.get(key, "not set")) for settings in flat)]
        for key in names
        if len({repr(settings.get(key)) for settings in flat}) > 1
    ]
    return table(["key", *(text(name) for name, _ in runs)], rows) if rows else "<p>None.</p>"


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.removesuffix("."): tree} if prefix else {}
    return {key: value for name, child in tree.items() for key, value in _flatten(child, f"{prefix}{name}.").items()}


def _named(item: Drawn, name: str) -> Drawn:
    return Drawn(name, item.chart, item.legend)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The directories' names, with as many of their parents as it takes to distinguish them."""
    paths = [record.run_dir.resolve().parts for record in records]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]
