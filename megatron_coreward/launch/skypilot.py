"""SkyPilot, through nemo-run's `SkypilotJobsExecutor`: a managed job, which SkyPilot itself recovers from preemption.

The run directory is in a storage that is mounted in every incarnation of the job, so an attempt continues after
the last one. Its nodes run the same script as those of a Slurm job without containers.
"""

import contextlib
import importlib.util
import io
import secrets
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from megatron_coreward.errors import InputError
from megatron_coreward.launch import scripts
from megatron_coreward.launch.job import Job, check_gpu, is_inside
from megatron_coreward.launch.settings import SkyPilotCluster
from megatron_coreward.launch.supervise import Outcome, exit_outcome

_THERE = PurePosixPath("/nemo_run")  # where the executor puts the job's directory
_PORT = 6379  # 6380 is that of SkyPilot's own Ray
# States of a managed job in which it waits or runs, and what a controller that does not answer says; others are ends.
_ALIVE = ("", "PENDING", "DEPRECATED_SUBMITTED", "SUBMITTED", "STARTING", "RUNNING", "RECOVERING", "CANCELLING")


class SkyPilot:
    """One managed job."""

    def __init__(self, job: Job, cluster: SkyPilotCluster) -> None:
        if importlib.util.find_spec("sky") is None:
            raise InputError("launch skypilot needs SkyPilot, which is not installed: pip install 'nemo-run[skypilot]'")
        if job.gpus_per_node and cluster.gpus is None:
            raise InputError(f"--gpus-per-node {job.gpus_per_node}: the cluster's file has no gpus, such as gpus: H100")
        if job.time is not None:
            raise InputError("--time: SkyPilot's jobs have no time limit")
        if not is_inside(PurePosixPath(job.config.run_dir), cluster.storage):
            raise InputError(
                f"run_dir: {job.config.run_dir} is in no storage, and would be lost with its machine; allowed: a path "
                f"under {', '.join(cluster.storage)}"
            )
        check_gpu(job.config, {"gpus": cluster.gpus})
        self.job, self.cluster = job, cluster
        self.files = {
            scripts.CONFIG: job.config_text,
            scripts.DRIVER: _to_console(
                scripts.driver_script(_THERE, cluster.python, cluster.workdir, cluster.secrets)
            ),
            scripts.NODE: scripts.node_script(_THERE, cluster.python, job.nodes, job.gpus_per_node, (), None),
        }

    def preview(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            task = self._task(Path(folder)).to_yaml_config()
        task["file_mounts"][str(_THERE)] = "the files above, and a token for Ray"
        parts = [f"# ==> {_THERE / name}\n{text}" for name, text in self.files.items()]
        return "\n".join([*parts, f"# ==> sky jobs launch\n{yaml.safe_dump(task, sort_keys=False)}".rstrip()])

    def submit(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            number, _ = self._executor(Path(folder)).launch(self._task(Path(folder)))
        return str(number)

    def poll(self, job: str) -> Outcome | None:
        found = self._executor(Path()).status(self._app(job))
        state = "" if found is None else found["status"].value
        if state == "SUCCEEDED":
            return exit_outcome(0, "")
        if state == "CANCELLED":
            return Outcome("cancelled", "somebody has cancelled it")
        return None if state in _ALIVE else Outcome("failed", f"state {state}")

    def new_log(self, job: str) -> str:
        """All of it once the job has ended; SkyPilot shows a running job's with `sky jobs logs`."""
        if self.poll(job) is None:
            return ""
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            self._executor(Path()).logs(self._app(job), None)
        return text.getvalue()

    def interrupted(self, job: str) -> str:
        if not job:
            return f"interrupted while {self.job.name} was submitted; the queue shows whether it was"
        return (
            f"job {job} continues without this launcher; `sky jobs logs {job}` shows it, `sky jobs cancel {job}` ends "
            "it"
        )

    def _app(self, job: str) -> str:
        return f"{self.job.name}___train___{job}"

    def _task(self, folder: Path) -> Any:
        (folder / "code").mkdir(exist_ok=True)
        for name, text in {**self.files, scripts.TOKEN: secrets.token_hex(32)}.items():
            (folder / name).write_text(text)
        command = f'{scripts.RAY_HEAD}="$head_node_ip:{_PORT}" bash {_THERE / scripts.NODE}'
        return self._executor(folder).to_task(self.job.name, [command])

    def _executor(self, folder: Path) -> Any:
        from nemo_run.core.execution.skypilot_jobs import SkypilotJobsExecutor
        from nemo_run.core.packaging.git import GitArchivePackager

        c = self.cluster
        return SkypilotJobsExecutor(
            infra=c.infra,
            gpus=c.gpus if self.job.gpus_per_node else None,
            gpus_per_node=self.job.gpus_per_node or None,
            cpus=c.cpus,
            memory=c.memory,
            container_image=c.image,
            num_nodes=self.job.nodes,
            use_spot=c.use_spot,
            file_mounts=dict(c.files),
            storage_mounts=c.storage,
            env_vars=dict(c.env),
            setup="\n".join(c.setup) or None,
            packager=GitArchivePackager(),
            job_dir=str(folder),
        )


def _to_console(script: str) -> str:
    """What an attempt prints belongs to SkyPilot's log: the machine's own files go with it."""
    return script.replace(f" >> {_THERE / scripts.LOG} 2>&1", "")
