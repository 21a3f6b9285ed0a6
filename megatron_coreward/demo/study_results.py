"""A study from its cells to its picture and its table, which are made from what was recorded (`study_records`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_coreward.demo import later_methods, rephrasings, stability
from megatron_coreward.demo.study import Cell, run_cells
from megatron_coreward.demo.study_records import ACCURACY, Record, by_name, read_records, record_run
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.bands import Panel, Scale, draw_bands


def run_study(
    study: str, run_dir: Path, arms: Sequence[str] = (), rates: Sequence[float] = (), seeds: Sequence[int] = ()
) -> Path:
    """Runs the cells of a study that are not done and shows what there is, earlier cells included. Returns the picture.

    Raises InputError, before anything runs, for an unknown arm and for arms or rates of a study that has none.
    """
    if (arms or rates) and study != stability.STUDY:
        raise InputError(f"--methods, --rates: found with --study {study}; allowed: with --study {stability.STUDY}")
    cells = _STUDIES[study].cells(arms, rates, seeds)
    recorded = run_dir / study / "recorded"
    run_cells(run_dir, study, cells, done=lambda cell, cell_dir: record_run(cell_dir, cell.name, cell.seed, recorded))
    return show(study, recorded, run_dir / study / f"{study}.png")


def show(study: str, recorded: Path, picture: Path) -> Path:
    """Draws and prints a study from what was recorded of it. Raises InputError if there is nothing."""
    records = read_records(recorded)
    if not records:
        raise InputError(f"{recorded}: found no recorded run (*.csv.gz); allowed: a directory that a study has written")
    console = Console()
    _STUDIES[study].draw(records, picture)
    console.print(_STUDIES[study].table(records))
    console.print(f"curves: {picture}")
    return picture


_PANELS: tuple[tuple[str, str, Scale], ...] = (
    (ACCURACY, "held-out accuracy", "share"),
    ("reward/mean", "reward", "linear"),
    ("vote/share", "vote share", "share"),
    ("loss/kl", "KL (nats a token)", "log"),
)


def draw_stability(records: Sequence[Record], out: Path) -> Path:
    """A row of charts for each learning rate: accuracy, reward, vote share, KL; one line a method. Returns `out`."""
    rows = []
    for rate in sorted({float(record.name.rpartition("/lr-")[2]) for record in records}):
        arms = {
            arm: [record for record in records if record.name == stability.name_of(arm, rate)] for arm in stability.ARMS
        }
        if any(arms.values()):
            rows.append(
                [
                    Panel(
                        f"{title}, lr {rate:g}",
                        {arm: [_plotted(arm, key, run) for run in runs] for arm, runs in arms.items()},
                        scale,
                    )
                    for key, title, scale in _PANELS
                ]
            )
    return draw_bands(rows, out)


def _plotted(arm: str, key: str, record: Record) -> dict[float, float]:
    """Certainty rewards are of another size: only rewards between 0 and 1 share an axis."""
    if key == "reward/mean" and arm in ("entropy", "self_certainty"):
        return {}
    series = record.series(key)
    return {float(step): value for step, value in series.items() if key != "loss/kl" or value > 0}


def stability_table(records: Sequence[Record]) -> Table:
    """A line for each method, rate and seed: accuracy at first, at its best and when that was, at the end (mean of two
    validations), the change from best to last in points, and the vote share at the end."""
    title = f"held-out accuracy ({ACCURACY.removeprefix('val/')}) in {stability.STEPS} steps"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # within 80 columns
    for column in ("method", "lr", "seed", "first", "best", "at", "last", "change", "votes"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for line in stability_lines(records):
        table.add_row(*line)
    return table


def stability_lines(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The cells of `stability_table`."""
    arms = list(stability.ARMS)

    def place(record: Record) -> tuple[float, int, int]:
        arm, rate = record.name.split("/lr-")
        return float(rate), arms.index(arm) if arm in arms else len(arms), record.seed

    for record in sorted(records, key=place):
        accuracy = record.series(ACCURACY)
        best = max(accuracy, key=lambda step: accuracy[step])
        last = fmean([accuracy[step] for step in sorted(accuracy)[-2:]])
        votes = record.series("vote/share")
        arm, rate = record.name.split("/lr-")
        yield (
            arm,
            rate,
            str(record.seed),
            f"{accuracy[min(accuracy)]:.1%}",
            f"{accuracy[best]:.1%}",
            str(best),
            f"{last:.1%}",
            f"{100 * (last - accuracy[best]):+.1f}",
            f"{fmean([votes[step] for step in sorted(votes)[-15:]]):.0%}",
        )


def draw_rephrasing(records: Sequence[Record], out: Path) -> Path:
    """Accuracy at the end against the share of damaged rephrasings, with and without the filter. Returns `out`."""
    named = by_name(records)
    lines: dict[str, list[dict[float, float]]] = {}
    for filtered, label in ((False, "all rephrasings"), (True, "those that pass the filter")):
        for seed in rephrasings.SEEDS:
            series = {
                100 * share: end_of(record)
                for share in sorted(rephrasings.SHARES)
                for record in named.get(rephrasings.name_of(share, filtered and share > 0), [])
                if record.seed == seed
            }
            lines.setdefault(label, []).append(series)
    title = f"held-out accuracy after {rephrasings.STEPS} steps"
    return draw_bands([[Panel(title, lines, "share")]], out, "damaged rephrasings (%)", legend_columns=1)


def rephrasing_table(records: Sequence[Record]) -> Table:
    """A line for each share of damage: accuracy at the end with and without the filter, for each seed."""
    table = Table(title=f"held-out accuracy after {rephrasings.STEPS} steps, from the start's")
    for column in ("damaged", "filter", *(f"seed {seed}" for seed in rephrasings.SEEDS)):
        table.add_column(column, justify="right")
    for share in sorted(rephrasings.SHARES):
        for filtered in (False, True) if share else (False,):
            runs = {r.seed: r for r in records if r.name == rephrasings.name_of(share, filtered)}
            ends = [
                f"{start_of(runs[seed]):.1%} -> {end_of(runs[seed]):.1%}" if seed in runs else "-"
                for seed in rephrasings.SEEDS
            ]
            table.add_row(f"{share:.0%}", "yes" if filtered else "no", *ends)
    return table


def start_of(record: Record) -> float:
    """Accuracy before training."""
    return record.series(ACCURACY)[0]


def end_of(record: Record) -> float:
    """Accuracy at the end: the mean of the last two validations, for one alone is noisy."""
    accuracy = record.series(ACCURACY)
    return fmean([accuracy[step] for step in sorted(accuracy)[-2:]])


def draw_methods(records: Sequence[Record], out: Path) -> Path:
    """Accuracy, and the share of rollouts that were rewarded rightly, over the steps; one line a method."""
    named = by_name(records)
    panels = [
        Panel(
            title,
            {
                method: [{float(step): value for step, value in run.series(key).items()} for run in named[method]]
                for method in later_methods.METHODS
                if method in named
            },
            "share",
        )
        for key, title in ((ACCURACY, "held-out accuracy"), ("reward/accuracy", "rollouts rewarded rightly"))
    ]
    return draw_bands([panels], out)


def methods_table(records: Sequence[Record]) -> Table:
    """A line for each method and seed: accuracy at first and at the end (mean of two validations), and the change."""
    table = Table(title=f"held-out accuracy ({ACCURACY.removeprefix('val/')}) in {later_methods.STEPS} steps")
    for column in ("method", "seed", "first", "last", "change"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for record in sorted(records, key=lambda record: (later_methods.METHODS.index(record.name), record.seed)):
        first, last = start_of(record), end_of(record)
        table.add_row(record.name, str(record.seed), f"{first:.1%}", f"{last:.1%}", f"{100 * (last - first):+.1f}")
    return table


@dataclass(frozen=True, slots=True)
class _Study:
    cells: Callable[[Sequence[str], Sequence[float], Sequence[int]], list[Cell]]  # of arms, rates, seeds; none: of all
    draw: Callable[[Sequence[Record], Path], Path]
    table: Callable[[Sequence[Record]], Table]


_STUDIES: Mapping[str, _Study] = {
    stability.STUDY: _Study(stability.cells, draw_stability, stability_table),
    rephrasings.STUDY: _Study(
        lambda arms, rates, seeds: rephrasings.cells(seeds=seeds), draw_rephrasing, rephrasing_table
    ),
    later_methods.STUDY: _Study(lambda arms, rates, seeds: later_methods.cells(seeds), draw_methods, methods_table),
}
