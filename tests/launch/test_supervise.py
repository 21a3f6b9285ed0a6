"""The launcher's loop, with a backend that is a list of outcomes."""

from collections.abc import Sequence

import pytest

from megatron_coreward.errors import RunError
from megatron_coreward.launch.supervise import Outcome, exit_outcome, supervise

STOPPED = Outcome("stopped", "time limit")
FINISHED = Outcome("finished", "all steps are done")


class Jobs:
    """Every submission waits once, prints one line, and ends as the list says."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        self.submitted = 0
        self.polls = 0

    def preview(self) -> str:
        return ""

    def submit(self) -> str:
        self.submitted += 1
        self.polls = 0
        return str(self.submitted)

    def poll(self, job: str) -> Outcome | None:
        self.polls += 1
        return None if self.polls == 1 else self.outcomes[self.submitted - 1]

    def new_log(self, job: str) -> str:
        return f"job {job} poll {self.polls}\n"

    def interrupted(self, job: str) -> str:
        return f"{job} goes on"


def run(jobs: Jobs, max_resubmits: int = 5, detach: bool = False) -> list[str]:
    lines: list[str] = []
    supervise(jobs, max_resubmits=max_resubmits, detach=detach, poll_s=0, write=lambda line: lines.append(str(line)))
    return lines


def test_a_stopped_job_is_submitted_again_until_it_is_finished() -> None:
    jobs = Jobs([STOPPED, STOPPED, FINISHED])
    lines = run(jobs)
    assert jobs.submitted == 3
    assert lines[0] == "in the queue: 1"
    assert "job 1: time limit; submitting it again (5 left)" in lines
    assert lines[-1] == "finished: all steps are done"
    assert [line for line in lines if line.startswith("job 3 poll")] == ["job 3 poll 1", "job 3 poll 2"]


@pytest.mark.parametrize("kind", ["failed", "cancelled"])
def test_what_failed_or_was_cancelled_is_not_submitted_again(kind: str) -> None:
    jobs = Jobs([Outcome(kind, "because")])  # type: ignore[arg-type]
    with pytest.raises(RunError, match=f"job 1 {kind}: because"):
        run(jobs)
    assert jobs.submitted == 1


def test_the_number_of_submissions_is_bounded() -> None:
    jobs = Jobs([STOPPED] * 9)
    with pytest.raises(RunError, match="--max-resubmits 2"):
        run(jobs, max_resubmits=2)
    assert jobs.submitted == 3


def test_detached_it_submits_and_leaves() -> None:
    jobs = Jobs([FINISHED])
    assert run(jobs, detach=True) == ["in the queue: 1"]
    assert jobs.polls == 0


def test_a_launcher_that_is_interrupted_says_what_becomes_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs([FINISHED])
    monkeypatch.setattr(jobs, "poll", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    lines: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        supervise(jobs, max_resubmits=1, poll_s=0, write=lines.append)
    assert lines[-1] == "1 goes on"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (0, "finished"),
        (75, "stopped"),
        (137, "stopped"),
        (-9, "stopped"),
        (None, "stopped"),
        (1, "failed"),
        (2, "failed"),
    ],
)
def test_exit_statuses_have_one_meaning(status: int | None, kind: str) -> None:
    assert exit_outcome(status, "node lost").kind == kind


def test_an_interrupt_during_the_submission_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, lines = Jobs([FINISHED]), []
    monkeypatch.setattr(jobs, "submit", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        supervise(jobs, max_resubmits=1, poll_s=0, write=lambda line: lines.append(str(line)))
    assert lines == [" goes on"]
