"""Being asked to leave: a scheduler's signal becomes a clean stop, with everything saved.

The handler only takes a note. Waits that may be given up (rollouts, start-up) look at it and end; all else is finished,
and the run stops at the next step's end.
"""

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

from megatron_coreward.errors import RunError


class Preempted(RunError):
    """The run was asked to stop and has done so; the message says what was saved and how to go on."""


class StopRequest:
    """Whether somebody has asked the run to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def check(self) -> None:
        """Raises Preempted once there is a request."""
        if self.signal is not None:
            raise Preempted(f"stopped by {self.signal}")


class StopSignals(StopRequest):
    """A request that arrives as a signal, within a `with` block of the main thread; elsewhere none arrives.

    The first signal of a kind is the request. A second one does what it would have done without us.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._signals = [signal.Signals[name] for name in names]
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.take()
        return self

    def take(self) -> None:
        """Takes the signals; once more after a library has put handlers of its own in place (as `ray.init` does)."""
        if threading.current_thread() is threading.main_thread() and self.signal is None:
            for number in self._signals:
                found = signal.signal(number, self._note)
                if found != self._note:
                    self._before[number] = found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        arrived = signal.Signals(number)
        self.signal = arrived.name
        signal.signal(number, self._before[arrived] if self._before.get(arrived) is not None else signal.SIG_DFL)
