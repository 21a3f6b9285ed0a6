"""What a person at the terminal sees of a run while it goes on.

`live` draws one panel that stays in place: progress and time left, the phase that runs now, the metrics that show
whether training is well, where the last step's time went, and the validation rows. If the output is no terminal, or
`plain` is asked for, each step is one line. Both show the same metrics; one that a run does not have is left out.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from statistics import fmean
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.display import (
    HEADLINE,
    Shown,
    format_seconds,
    format_value,
    phase_seconds,
    sparkline,
)
from megatron_coreward.telemetry.sinks import Sink
from megatron_coreward.telemetry.untrusted_text import printable, say

Mode = Literal["auto", "live", "plain", "off"]

_HISTORY = 24  # steps that a sparkline shows, half of them on a narrow terminal
_WIDE = 110  # columns
_ETA_STEPS = 20  # steps whose mean time predicts the time left
_VALIDATIONS = 6  # validation rows in the live panel
_TIME_BAR = 48  # characters

_PHASE_COLORS = {
    "teacher_ema": "magenta",
    "switch": "bright_yellow",
    "sync": "yellow",
    "rephrasing": "bright_cyan",
    "rollout": "cyan",
    "token_stats": "bright_blue",
    "rewards": "bright_magenta",
    "update": "green",
    "validation": "blue",
    "anchors": "bright_cyan",
    "checkpoint": "red",
    keys.OUTSIDE: "bright_black",
}


class RunView(Sink, Protocol):
    """A sink that a person watches: it also hears what runs now."""

    def phase(self, name: str | None) -> None:
        """The phase that has begun; None between phases. Fits `PhaseTimer(on_change=...)`."""

    def note(self, text: str) -> None:
        """One line that stays on the screen."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_view(
    mode: Mode, *, title: str, total_steps: int, steps_done: int = 0, stream: TextIO | None = None
) -> RunView:
    """The view of a run. `auto` and `live` fall back to plain lines if the stream is no terminal.

    `title` says what runs (method, run directory); `steps_done` is where a resumed run starts. The stream is standard
    output unless another is given.
    """
    stream = stream or sys.stdout
    if mode == "off":
        return SilentView()
    if mode != "plain" and stream.isatty():
        return LiveView(title, total_steps, steps_done, Console(file=stream))
    return PlainView(title, total_steps, steps_done, stream)


class _View:
    """Closes when its `with` block ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to let go of."""


class SilentView(_View):
    """Shows nothing."""

    def phase(self, name: str | None) -> None:
        """Not shown."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""


class PlainView(_View):
    """One line a step, one line a validation: for logs and pipes."""

    def __init__(self, title: str, total_steps: int, steps_done: int, stream: TextIO) -> None:
        self._total = total_steps
        self._times: deque[float] = deque(maxlen=_ETA_STEPS)
        self._stream = stream
        self.note(f"{title}: {total_steps} steps" + (f", resumed after step {steps_done}" if steps_done else ""))

    def phase(self, name: str | None) -> None:
        """Not shown: a line a step is all there is."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = metrics[keys.STEP_TIME]
        if step > 0:
            self._times.append(seconds)
            values = [f"{shown.label} {format_value(value, shown.kind)}" for shown, value in _headline(metrics)]
            # What would read as 0.0 is left out.
            timed = [(phase, duration) for phase, duration in phase_seconds(metrics) if duration >= 0.05]
            phases = ", ".join(f"{phase} {duration:.1f}" for phase, duration in timed)
            took = f"{format_seconds(seconds)} ({phases})" if phases else format_seconds(seconds)
            self.note("  ".join([f"step {step}/{self._total}", *values, took, *_eta(self._times, self._total - step)]))
        if validation := _validation(metrics):
            self.note("  ".join([f"validation after step {step}", *(f"{name} {value}" for name, value in validation)]))

    def note(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more: its other end is closed, or its disk is full
            say(text, self._stream)


class LiveView(_View):
    """A panel that stays in place; other output of the process scrolls above it."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        steps_done: int,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._console = console
        self._total = total_steps
        self._done = steps_done
        self._clock = clock
        self._begin = clock()
        self._phase: str | None = None
        self._phase_begin = self._begin
        self._spinner = Spinner("dots", style="cyan")
        self._times: deque[float] = deque(maxlen=_ETA_STEPS)
        self._history: dict[str, tuple[float, ...]] = {}
        self._metrics: Mapping[str, float] = {}
        self._validations: list[tuple[int, list[tuple[str, str]]]] = []
        # The frame is drawn on every refresh, by a thread of rich's: it reads what the methods below assign whole.
        self._live = Live(console=console, get_renderable=self.frame, refresh_per_second=4)
        self._live.start()

    def phase(self, name: str | None) -> None:
        self._phase_begin = self._clock()
        self._phase = name

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if step > 0:
            self._done = step
            self._times.append(metrics[keys.STEP_TIME])
            grown = {
                shown.key: (*self._history.get(shown.key, ()), value)[-_HISTORY:] for shown, value in _headline(metrics)
            }
            self._history = self._history | grown
            self._metrics = dict(metrics)
        if validation := _validation(metrics):
            self._validations = [*self._validations, (step, validation)]
        with suppress(OSError, ValueError):  # the terminal has gone
            self._live.refresh()

    def note(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._console.print(Text(printable(text)))

    def close(self) -> None:
        self._phase = None
        with suppress(OSError, ValueError):
            self._live.stop()

    def frame(self) -> RenderableType:
        """The panel as of now."""
        parts: list[RenderableType] = [self._progress(), self._now()]
        if self._metrics:
            parts += [Text(), self._headline_table(), Text(), self._time_split()]
        if self._validations:
            parts += [Text(), self._validation_table()]
        return Panel(
            Group(*parts), title=Text(printable(self._title), style="bold"), title_align="left", padding=(0, 1)
        )

    @property
    def _wide(self) -> bool:
        return self._console.width >= _WIDE

    def _progress(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"step {self._done}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=self._done, width=40 if self._wide else 24),
            Text(f"{format_seconds(self._clock() - self._begin)} elapsed"),
            *(Text(left, style="bold cyan") for left in _eta(self._times, self._total - self._done)),
        )
        return grid

    def _now(self) -> RenderableType:
        if self._phase is None:
            return Text()
        elapsed = format_seconds(self._clock() - self._phase_begin)
        self._spinner.update(text=Text.assemble((self._phase, "cyan"), f"  {elapsed}"))
        return self._spinner

    def _headline_table(self) -> RenderableType:
        """Two metrics a row: label, value, and the way it has gone."""
        shown_steps = _HISTORY if self._wide else _HISTORY // 2
        cells = [
            (
                Text(shown.label, style="dim"),
                Text(format_value(value, shown.kind), style="bold"),
                Text(sparkline(self._history[shown.key][-shown_steps:]), style="cyan"),
            )
            for shown, value in _headline(self._metrics)
        ]
        grid = Table.grid(padding=(0, 2))
        for column in range(6):
            grid.add_column(
                justify="right" if column % 3 == 1 else "left", min_width=shown_steps if column == 2 else None
            )
        half = math.ceil(len(cells) / 2)
        for row in range(half):
            grid.add_row(*cells[row], *(cells[row + half] if row + half < len(cells) else ()))
        return grid

    def _time_split(self) -> RenderableType:
        phases = phase_seconds(self._metrics)
        total = sum(seconds for _, seconds in phases)
        bar = Text(f"last step {format_seconds(self._metrics[keys.STEP_TIME])}  ", style="bold")
        legend: list[RenderableType] = []
        filled = 0
        reached = 0.0
        for phase, seconds in phases:
            reached += seconds
            width = round(reached / total * _TIME_BAR) - filled
            filled += width
            bar.append("█" * width, style=_PHASE_COLORS[phase])
            legend.append(Text.assemble(("■ ", _PHASE_COLORS[phase]), (f"{phase} {format_seconds(seconds)}", "dim")))
        return Group(bar, Columns(legend, padding=(0, 2)))

    def _validation_table(self) -> RenderableType:
        names = [name for name, _ in self._validations[-1][1]]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("validation")
        for name in names:
            table.add_column(name, justify="right")
        for step, values in self._validations[-_VALIDATIONS:]:
            row = dict(values)
            table.add_row(f"after step {step}", *(row.get(name, "") for name in names))
        return table


def _eta(times: Collection[float], steps_left: int) -> list[str]:
    """The time left, from the mean of the last steps; nothing before the first step and after the last."""
    return [f"eta {format_seconds(fmean(times) * steps_left)}"] if times and steps_left > 0 else []


def _headline(metrics: Mapping[str, float]) -> list[tuple[Shown, float]]:
    return [(shown, metrics[shown.key]) for shown in HEADLINE if shown.key in metrics]


def _validation(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The accuracies (`val/avg@8`), without `val/` and as percentages."""
    accuracies = [key for key in keys.validation_keys(metrics) if "@" in key]
    return [(key.removeprefix("val/"), format_value(metrics[key], "share")) for key in accuracies]
