"""Where the wall time of a step goes.

Invariants, each held by a test:
- the top-level phases and `time/outside_s` add up to `step_time_s`;
- a phase that is entered again adds to its time; a phase inside another is reported as `time/<outer>.<inner>_s` and is
  part of the outer one's time;
- a phase that ends with an exception is timed like any other.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_coreward.telemetry import keys


class PhaseTimer:
    """Times the phases of one step, from its construction to `metrics()`.

    `on_change` hears the phase that has begun (`outer.inner` for nested ones), and None between phases; `clock` gives
    seconds.
    """

    def __init__(
        self,
        on_change: Callable[[str | None], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._on_change = on_change
        self._clock = clock
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall time of the `with` block to the phase `name`."""
        self._open.append(name)
        path = ".".join(self._open)
        self._announce(path)
        begin = self._clock()
        try:
            yield
        finally:
            self._seconds[path] = self._seconds.get(path, 0.0) + self._clock() - begin
            self._open.pop()
            self._announce(".".join(self._open) or None)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds in each finished phase, by path."""
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """`step_time_s` up to now, `time/<phase>_s` of each phase, and the step's seconds and share outside of them."""
        if self._open:
            raise RuntimeError(f"phase {'.'.join(self._open)} is still open")
        total = self._clock() - self._start
        inside = sum(seconds for path, seconds in self._seconds.items() if "." not in path)
        outside = max(total - inside, 0.0)
        return {
            keys.STEP_TIME: total,
            **{f"time/{path}_s": seconds for path, seconds in self._seconds.items()},
            f"time/{keys.OUTSIDE}_s": outside,
            f"time/{keys.OUTSIDE}_share": outside / total if total > 0 else 0.0,
        }

    def _announce(self, path: str | None) -> None:
        if self._on_change is not None:
            self._on_change(path)
