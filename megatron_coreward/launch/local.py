"""This machine, through nemo-run's `LocalExecutor`."""

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from megatron_coreward.errors import InputError
from megatron_coreward.launch import scripts
from megatron_coreward.launch.job import Job
from megatron_coreward.launch.settings import LocalCluster
from megatron_coreward.launch.supervise import Outcome, exit_outcome

_TASK = "train"
_PID = "pid"


class Local:
    """One job in a process of this machine."""

    def __init__(self, job: Job, cluster: LocalCluster) -> None:
        if job.nodes != 1:
            raise InputError(f"--nodes {job.nodes}: launch local runs on 1 node, this one")
        if job.time is not None:
            raise InputError("--time: launch local has no time limit")
        self.job, self.cluster = job, cluster
        self.directory = Path(job.config.run_dir).resolve() / "launch"
        self._experiment: Any = None
        self._shown = 0
        there = PurePosixPath(self.directory)
        self.files = {
            scripts.CONFIG: job.config_text,
            scripts.DRIVER: scripts.driver_script(
                there,
                cluster.python or sys.executable,
                PurePosixPath(os.getcwd()),
                cluster.secrets,
                setup=[f"echo $$ > {shlex.quote(str(there / _PID))}"],
                env=cluster.env,
            ),
        }

    def preview(self) -> str:
        parts = [f"# ==> {self.directory / name}\n{text}" for name, text in self.files.items()]
        return "\n".join([*parts, f"# ==> run with\n{shlex.join(['bash', str(self.directory / scripts.DRIVER)])}"])

    def submit(self) -> str:
        import nemo_run
        from nemo_run.core.frontend.console.api import CONSOLE

        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (scripts.STATUS, _PID):
            (self.directory / name).unlink(missing_ok=True)
        log = self.directory / scripts.LOG
        self._shown = log.stat().st_size if log.exists() else 0
        for name, text in self.files.items():
            (self.directory / name).write_text(text)
        CONSOLE.quiet = True
        self._experiment = nemo_run.Experiment(
            self.job.name,
            executor=nemo_run.LocalExecutor(),
            base_dir=str(self.directory / "nemo_run"),
            log_level="WARNING",
        )
        self._experiment.console.quiet = True
        self._experiment.__enter__()
        script = nemo_run.Script(path=str(self.directory / scripts.DRIVER), entrypoint="bash")
        self._experiment.add(script, name=_TASK)
        self._experiment.run(detach=False, tail_logs=False, direct=False, sequential=False)
        return str(self._experiment.status(return_dict=True)[_TASK]["job_id"])

    def poll(self, job: str) -> Outcome | None:
        state = self._experiment.status(return_dict=True)[_TASK]["status"]
        if state.name not in ("SUCCEEDED", "FAILED", "CANCELLED"):
            return None
        self._experiment.__exit__(None, None, None)
        try:
            status = int((self.directory / scripts.STATUS).read_text())
        except FileNotFoundError:
            return Outcome("failed", f"it died without saying how; see {self.directory / scripts.LOG}")
        return exit_outcome(status, state.name)

    def new_log(self, job: str) -> str:
        log = self.directory / scripts.LOG
        if not log.exists():
            return ""
        with log.open("rb") as file:
            file.seek(self._shown)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._shown += len(whole + newline)
        return (whole + newline).decode(errors="replace")

    def interrupted(self, job: str) -> str:
        """Asks the training to stop and waits until it has saved."""
        with suppress(FileNotFoundError, psutil.NoSuchProcess):  # it had not begun yet, or has ended by itself
            driver = psutil.Process(int((self.directory / _PID).read_text()))
            driver.terminate()
            driver.wait()
        return "stopped; the same launch command goes on from the last checkpoint"
