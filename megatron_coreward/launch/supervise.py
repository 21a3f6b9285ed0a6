"""Submit, show what the run prints, submit again until it is finished. Knows no scheduler."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_coreward.errors import RunError


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    kind: Literal["finished", "stopped", "failed", "cancelled"]  # stopped: to submit it again is what it needs
    detail: str


class Backend(Protocol):
    """One way to run a job."""

    def preview(self) -> str:
        """Exactly what `submit` would submit."""

    def submit(self) -> str:
        """Submits the job, or finds it in the queue already; returns its name there."""

    def poll(self, job: str) -> Outcome | None:
        """How the job ended; None while it waits or runs."""

    def new_log(self, job: str) -> str:
        """What the run has printed since the last call."""

    def interrupted(self, job: str) -> str:
        """Called when the launcher leaves early; returns what becomes of the job, in words.

        Args:
            job: empty if the launcher was interrupted while it submitted.
        """


def exit_outcome(status: int | None, otherwise: str) -> Outcome:
    """What an attempt's exit status says (see `attempt`); None: it could not say, and `otherwise` names why."""
    if status == 0:
        return Outcome("finished", "all steps are done")
    if status == 75:
        return Outcome("stopped", "it stopped before its last step")
    if status is None or status >= 128 or status < 0:
        return Outcome("stopped", otherwise if status is None else f"killed (exit status {status})")
    return Outcome("failed", f"exit status {status}")


def supervise(
    backend: Backend,
    *,
    max_resubmits: int,
    detach: bool = False,
    poll_s: float = 5.0,
    write: Callable[[str], object] = print,
) -> None:
    """Runs the job to its end.

    Args:
        max_resubmits: submissions after the first one at most.
        detach: return after the first submission.

    Raises:
        RunError: the run failed, was cancelled, or was stopped more often than it may be submitted again.
    """
    for submission in range(max_resubmits + 1):
        job = ""
        try:
            job = backend.submit()
            write(f"in the queue: {job}")
            if detach:
                return
            outcome = _watch(backend, job, poll_s, write)
        except KeyboardInterrupt:
            write(backend.interrupted(job))
            raise
        if outcome.kind == "finished":
            write(f"finished: {outcome.detail}")
            return
        if outcome.kind != "stopped":
            raise RunError(f"job {job} {outcome.kind}: {outcome.detail}")
        if submission < max_resubmits:
            write(f"job {job}: {outcome.detail}; submitting it again ({max_resubmits - submission} left)")
    raise RunError(f"job {job}: {outcome.detail}, and it may not be submitted again (--max-resubmits {max_resubmits})")


def _watch(backend: Backend, job: str, poll_s: float, write: Callable[[str], object]) -> Outcome:
    while True:
        outcome = backend.poll(job)
        _show(backend, job, write)
        if outcome is not None:
            return outcome
        time.sleep(poll_s)


def _show(backend: Backend, job: str, write: Callable[[str], object]) -> None:
    text = backend.new_log(job).rstrip("\n")
    if text:
        write(text)
