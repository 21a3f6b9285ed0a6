"""What the launcher makes of what Slurm says, with a tunnel whose answers are given."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_coreward.config.load import load_config
from megatron_coreward.errors import RunError
from megatron_coreward.launch.job import make_job
from megatron_coreward.launch.settings import SlurmCluster
from megatron_coreward.launch.slurm import Slurm
from tests.launch.arguments import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Answer:
    stdout: str = ""
    return_code: int = 0
    stderr: str = ""


@dataclass
class Tunnel:
    """Answers by the first word of a command."""

    answers: dict[str, Answer]
    asked: list[str] = field(default_factory=list)

    def run(self, command: str, warn: bool = False, hide: bool = True) -> Answer:
        self.asked.append(command)
        return self.answers.get(command.split()[0], Answer())

    def put(self, local: str, remote: str) -> None:
        self.asked.append(f"put {remote} {oct(Path(local).stat().st_mode & 0o777)}")


GONE = Answer(return_code=1, stderr="slurm_load_jobs error: Invalid job id specified")


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(make_job(load_config(write_recipe(tmp_path)), None, 1, 0, None), SlurmCluster())


@pytest.mark.parametrize("queue", [GONE, Answer()], ids=["forgotten", "not in the queue"])
@pytest.mark.parametrize(
    ("state", "status", "kind"),
    [
        ("COMPLETED", "0", "finished"),
        ("FAILED", "75", "stopped"),
        ("FAILED", "137", "stopped"),
        ("TIMEOUT", None, "stopped"),
        ("NODE_FAIL", None, "stopped"),
        ("PREEMPTED", None, "stopped"),
        ("FAILED", "1", "failed"),
        ("FAILED", "2", "failed"),
        ("FAILED", None, "failed"),
        ("CANCELLED", "75", "cancelled"),
        ("CANCELLED", None, "cancelled"),
        ("CANCELLED", "0", "finished"),
    ],
)
def test_an_ended_job(slurm: Slurm, queue: Answer, state: str, status: str | None, kind: str) -> None:
    said = Answer(return_code=1) if status is None else Answer(f"{status}\n")
    slurm._tunnel = Tunnel({"squeue": queue, "scontrol": Answer(f"JobId=1 JobState={state} Reason=None"), "cat": said})
    outcome = slurm.poll("1")
    assert outcome is not None
    assert outcome.kind == kind


def test_accounting_is_asked_where_the_controller_has_forgotten(slurm: Slurm) -> None:
    answers = {"squeue": GONE, "scontrol": GONE, "sacct": Answer("TIMEOUT\n"), "cat": Answer(return_code=1)}
    slurm._tunnel = Tunnel(answers)
    outcome = slurm.poll("1")
    assert outcome is not None
    assert (outcome.kind, outcome.detail) == ("stopped", "state TIMEOUT")


@pytest.mark.parametrize(
    "queue",
    [Answer("PENDING\n"), Answer("RUNNING\n"), Answer(return_code=1, stderr="Unable to contact slurm controller")],
)
def test_a_job_that_waits_or_runs_or_cannot_be_asked_about_goes_on(slurm: Slurm, queue: Answer) -> None:
    slurm._tunnel = Tunnel({"squeue": queue})
    assert slurm.poll("1") is None


def test_submission_writes_all_files_and_a_token_for_the_owner(slurm: Slurm) -> None:
    tunnel = Tunnel({"sbatch": Answer("42;cluster\n"), "wc": Answer("0\n")})
    slurm._tunnel = tunnel
    assert slurm.submit() == "42"
    for name in ("config.yaml", "driver.sh", "node.sh", "job.sbatch", "ray_token"):
        assert f"put {slurm.directory / name} 0o600" in tunnel.asked
    assert any(f"rm -f {slurm.directory / 'exit_status'}" in command for command in tunnel.asked)
    assert tunnel.asked[-2] == f"sbatch --requeue --parsable {slurm.directory / 'job.sbatch'}"
    assert tunnel.asked[-1] == f"put {slurm.directory / 'job_id'} 0o600"


def test_a_job_that_is_in_the_queue_is_not_submitted_twice(slurm: Slurm) -> None:
    answers = {"cat": Answer("41\n"), "squeue": Answer("RUNNING\n"), "wc": Answer("7\n")}
    tunnel = slurm._tunnel = Tunnel(answers)
    assert slurm.submit() == "41"
    assert not any(command.startswith(("sbatch", "put")) for command in tunnel.asked)
    answers |= {"squeue": GONE, "sbatch": Answer("42\n")}
    assert slurm.submit() == "42"


def test_a_refused_submission_is_an_error_with_slurms_words(slurm: Slurm) -> None:
    slurm._tunnel = Tunnel({"sbatch": Answer(return_code=1, stderr="invalid partition specified: gpu\n")})
    with pytest.raises(RunError, match="sbatch failed: invalid partition specified: gpu"):
        slurm.submit()


def test_the_log_comes_in_whole_lines_from_where_it_was_left(slurm: Slurm) -> None:
    slurm._tunnel = Tunnel({"tail": Answer("eins\nzwei")})
    assert slurm.new_log("1") == "eins\n"
    slurm.new_log("1")
    assert "tail -c +6 " in slurm._tunnel.asked[-1]
