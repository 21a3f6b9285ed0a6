"""Slurm, through nemo-run's `SlurmExecutor`: with containers (Pyxis) and without.

With containers the batch script is that of nemo-run's `RayJob` (`SlurmRayRequest`: Ray in a container on every node).
It cannot do without containers, so there the script is that of nemo-run's plain `SlurmExecutor` (`SlurmBatchRequest`),
with one task a node that starts Ray (`scripts.node_script`). The requests are used directly, not through `RayJob` and
`Experiment`: these ask for accounting (`sacct`), which small clusters lack, and know no dry run without `squeue`.

Time limit and preemption: Slurm sends SIGTERM to the steps (`stop_before_s` before the limit), the training saves, the
attempt exits with 75, and the batch script requeues its own job. That needs no launcher that is still there. What the
script could not requeue (a node that died, a limit without warning) is submitted again by `follow`.
"""

import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_coreward.errors import InputError, RunError
from megatron_coreward.launch import scripts
from megatron_coreward.launch.job import Job, check_gpu, is_inside
from megatron_coreward.launch.settings import SlurmCluster
from megatron_coreward.launch.slurm_options import check_options
from megatron_coreward.launch.supervise import Outcome, exit_outcome

SUBMIT = ("sbatch", "--requeue", "--parsable")
SCRIPT = "job.sbatch"
_JOB = "job_id"  # of the last submission
# What nemo-run is given for the job's directories, of which it quotes nothing.
_HERE, _LOGS = PurePosixPath("/COREWARD_PARENT/COREWARD_JOB"), PurePosixPath("/COREWARD_LOGS")
MAX_REQUEUES = 100  # of one job by itself
_RETRY_STATES = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REQUEUED", "DEADLINE")


class Slurm:
    """One job on a Slurm cluster."""

    def __init__(self, job: Job, cluster: SlurmCluster) -> None:
        check_options(cluster, job.time)
        check_gpu(job.config, {"constraint": cluster.constraint, "sbatch.gres": cluster.sbatch.get("gres")})
        self.job, self.cluster = job, cluster
        directory = PurePosixPath(job.config.run_dir.resolve()) / "launch"
        if cluster.job_dir is not None:
            directory = cluster.job_dir / job.name
        if not directory.is_absolute():
            raise InputError(f"job_dir: {directory}; allowed: an absolute path that all nodes see")
        if cluster.image is not None:
            _check_plain({"job_dir": str(directory), "image": cluster.image, "mounts": ",".join(cluster.mounts)})
        if cluster.ssh is not None and (cluster.job_dir is None or cluster.workdir is None):
            raise InputError("ssh: set job_dir and workdir too, to absolute paths over there")
        if cluster.mounts and cluster.image is None:
            raise InputError("mounts: there is no image; mounts are for containers")
        run_dir = (cluster.workdir or PurePosixPath(os.getcwd())) / PurePosixPath(job.config.run_dir)
        targets = [mount.partition(":")[2].partition(":")[0] for mount in cluster.mounts]
        if cluster.image is not None and not is_inside(run_dir, targets):
            raise InputError(
                f"run_dir: {run_dir} is in no mount, and would be lost with its container; allowed: a path under "
                f"{', '.join(targets) or 'a mount, of which there is none'}"
            )
        self.directory = directory
        self.files = self._files()
        self._shown = 0
        self._tunnel = self._executor().tunnel

    def preview(self) -> str:
        parts = [f"# ==> {self.directory / name}\n{text}" for name, text in self.files.items()]
        return "\n".join([*parts, f"# ==> submitted with\n{self._submit_command()}"])

    def submit(self) -> str:
        """Submits, unless the job of an earlier launch is still in the queue: two would write into one run."""
        running = self._job_in_queue()
        if running is not None:
            self._shown = self._size()
            return running
        there = shlex.quote(str(self.directory))
        self._run(f"mkdir -p {there}/code {there}/logs && rm -f {shlex.quote(str(self.directory / scripts.STATUS))}")
        self._shown = self._size()
        token = self.directory / scripts.TOKEN
        for name, text in self.files.items():
            self._put(text, self.directory / name)
        self._put(secrets.token_hex(32), token)
        self._run(f"chmod 600 {shlex.quote(str(token))}")
        job = self._run(self._submit_command()).strip().split(";")[0]
        self._put(job, self.directory / _JOB)
        return job

    def poll(self, job: str) -> Outcome | None:
        listed = self._tunnel.run(f"squeue -h -j {job} -o %T", warn=True, hide=True)
        if listed.return_code == 0 and listed.stdout.strip():
            return None
        if listed.return_code != 0 and "Invalid job id" not in listed.stderr:
            return None  # the controller does not answer; it will
        state = self._state(job)
        text = self._tunnel.run(f"cat {shlex.quote(str(self.directory / scripts.STATUS))}", warn=True, hide=True)
        status = int(text.stdout) if text.return_code == 0 and text.stdout.strip() else None
        if status == 0:
            return exit_outcome(0, state)
        if state == "CANCELLED":
            return Outcome("cancelled", "somebody has cancelled it; the same command goes on from its last checkpoint")
        if status is None and state not in _RETRY_STATES:
            return Outcome("failed", f"state {state} before the training could say how it ended; see {self.directory}")
        return exit_outcome(status, f"state {state}")

    def new_log(self, job: str) -> str:
        path = shlex.quote(str(self.directory / scripts.LOG))
        text = str(self._tunnel.run(f"tail -c +{self._shown + 1} {path}", warn=True, hide=True).stdout)
        whole, newline, _ = text.rpartition("\n")
        self._shown += len((whole + newline).encode())
        return whole + newline

    def interrupted(self, job: str) -> str:
        if not job:
            return f"interrupted while {self.job.name} was submitted; the queue shows whether it was"
        return (
            f"job {job} continues without this launcher; `scancel {job}` ends it, and the same launch command shows it "
            "again"
        )

    def _files(self) -> dict[str, str]:
        c, job = self.cluster, self.job
        python = c.python or ("python" if c.image else sys.executable)
        workdir = c.workdir or PurePosixPath(os.getcwd())
        contained = c.image is not None
        files = {
            scripts.CONFIG: job.config_text,
            scripts.DRIVER: scripts.driver_script(
                self.directory, python, workdir, c.secrets, setup=c.setup if contained else ()
            ),
        }
        if not contained:
            files[scripts.NODE] = scripts.node_script(
                self.directory, python, job.nodes, job.gpus_per_node, c.setup, c.object_store_gib
            )
        files[SCRIPT] = self._ray_script() if contained else self._plain_script()
        return files

    def _ray_script(self) -> str:
        """The batch script of nemo-run's RayJob; the attempt runs in the container of the Ray head."""
        from nemo_run.run.ray.slurm import SlurmRayRequest

        # A signal to all steps is for the training; Ray and its workers ignore it, or nothing could be saved.
        before_ray = ["trap '' TERM USR1", *self.cluster.setup, *scripts.exports(scripts.RAY_ENVIRONMENT)]
        request = SlurmRayRequest(
            name=self.job.name,
            cluster_dir=str(self.directory),
            template_name="ray.sub.j2",
            executor=self._executor(f'export {scripts.RAY_HEAD}="$ip_head"'),
            pre_ray_start_commands=before_ray,
            command=f"bash {self.directory / scripts.DRIVER}",
            workdir=str(self.directory),
            launch_cmd=list(SUBMIT),
        )
        # nemo-run 0.11.1 names account and partition to srun too, "None" if there is none, and as `-A=NAME`, which is
        # the account "=NAME" to srun; a step has them from its job.
        return str(request.materialize()).replace(f" -A={self.cluster.account} -p={self.cluster.partition}", "")

    def _plain_script(self) -> str:
        """The batch script of nemo-run's SlurmExecutor, which runs `node.sh` once a node."""
        from nemo_run.core.execution.slurm import SlurmBatchRequest

        # Not twice the same port for a job that is run again: what is left of the last attempt may still hold it.
        port = "$(( 20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 20000 ))"
        request = SlurmBatchRequest(
            launch_cmd=list(SUBMIT),
            jobs=[self.job.name],
            command_groups=[["bash", str(self._here / scripts.NODE)]],
            executor=self._executor(*self._head_address(), f'export {scripts.RAY_HEAD}="${{head_node_ip%% *}}:{port}"'),
            max_retries=0,  # its template would requeue whatever failed, bad input too
            extra_env={},
        )
        # nemo-run 0.11.1 writes paths bare into the srun line, and puts the job's directory wherever "/nemo_run"
        # stands, within paths too. So it gets names in their place.
        logs = str(self.directory / "logs").replace("%", "%%")  # Slurm's patterns have %
        script = str(request.materialize()).replace(str(_LOGS), shlex.quote(logs))
        return script.replace(str(_HERE), shlex.quote(str(self.directory)))

    def _executor(self, *setup: str) -> Any:
        from nemo_run.core.execution.slurm import SlurmExecutor, SlurmJobDetails
        from nemo_run.core.packaging.base import Packager
        from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel

        c, job = self.cluster, self.job
        parent = str(self._here.parent)
        if c.ssh is None:
            tunnel: Any = LocalTunnel(job_dir=parent)
        else:
            tunnel = SSHTunnel(job_dir=parent, host=c.ssh.host, user=c.ssh.user, identity=c.ssh.identity)
        folder = str(self.directory / "logs" if c.image is not None else _LOGS)
        token = str(self._here / scripts.TOKEN)
        env = {**c.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
        executor = SlurmExecutor(
            account=c.account,
            partition=c.partition,
            qos=c.qos,
            constraint=c.constraint,
            exclusive=True if c.exclusive else None,
            cpus_per_task=c.cpus_per_task,
            mem=c.mem,
            time=job.time or c.time,
            nodes=job.nodes,
            ntasks_per_node=1,
            gpus_per_node=job.gpus_per_node or None,
            signal=f"TERM@{c.stop_before_s}",
            additional_parameters=dict(c.sbatch) or None,
            container_image=c.image,
            container_mounts=list(c.mounts),
            env_vars={name: shlex.quote(value) for name, value in env.items()},
            setup_lines="\n".join(["", *self._requeue_lines(), *setup]),
            job_details=SlurmJobDetails(job_name=job.name, folder=folder),
            job_name_prefix="coreward-",
            packager=Packager(),
            tunnel=tunnel,
            retries=1,
        )
        executor.job_dir = str(self._here)
        return executor

    @property
    def _here(self) -> PurePosixPath:
        """The job's directory as nemo-run's scripts get it."""
        return self.directory if self.cluster.image is not None else _HERE

    def _head_address(self) -> list[str]:
        """A host that knows itself as 127.0.1.1 (Debian's default) is asked for an address that others reach."""
        if self.job.nodes == 1:
            return []
        ask = 'srun --nodes=1 --ntasks=1 -w "$head_node" hostname -I'
        return [f"case $head_node_ip in 127.*) head_node_ip=$({ask}) ;; esac"]

    def _requeue_lines(self) -> list[str]:
        """The batch script puts its own job back into the queue if that is what the attempt needs."""
        status = str(self._here / scripts.STATUS)
        return [
            f"rm -f {status}",
            "requeue_if_stopped() {",
            "    local status=$?",
            f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MAX_REQUEUES} ] && '
            '{ [ "$status" -eq 75 ] || [ "$status" -ge 128 ]; }; then',
            '        scontrol requeue "$SLURM_JOB_ID" && sleep 60',
            "    fi",
            "}",
            "trap requeue_if_stopped ERR",
        ]

    def _job_in_queue(self) -> str | None:
        known = self._tunnel.run(f"cat {shlex.quote(str(self.directory / _JOB))}", warn=True, hide=True)
        job = str(known.stdout).strip()
        if known.return_code != 0 or not job.isdigit():
            return None
        listed = self._tunnel.run(f"squeue -h -j {job} -o %T", warn=True, hide=True)
        if listed.return_code != 0 and "Invalid job id" not in listed.stderr:
            raise RunError(f"whether job {job} of the last launch is still there, squeue cannot say: {listed.stderr}")
        return job if listed.return_code == 0 and listed.stdout.strip() else None

    def _state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, TIMEOUT ...; UNKNOWN if neither controller nor accounting remember it."""
        shown = self._tunnel.run(f"scontrol show job -o {job}", warn=True, hide=True)
        found = re.search(r"\bJobState=(\w+)", shown.stdout)
        if found:
            return found[1]
        kept = self._tunnel.run(f"sacct -X -n -P -o State -j {job}", warn=True, hide=True).stdout.split()
        return kept[0] if kept else "UNKNOWN"

    def _submit_command(self) -> str:
        return shlex.join([*SUBMIT, str(self.directory / SCRIPT)])

    def _size(self) -> int:
        found = self._tunnel.run(f"wc -c < {shlex.quote(str(self.directory / scripts.LOG))}", warn=True, hide=True)
        return int(found.stdout or 0) if found.return_code == 0 else 0

    def _run(self, command: str) -> str:
        done = self._tunnel.run(command, warn=True, hide=True)
        if done.return_code != 0:
            raise RunError(f"{command.split()[0]} failed: {(done.stderr or done.stdout).strip()}")
        return str(done.stdout)

    def _put(self, text: str, target: PurePosixPath) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            local.touch(mode=0o600)
            local.write_text(text)
            self._tunnel.put(str(local), str(target))


def _check_plain(settings: Mapping[str, str]) -> None:
    """Raises InputError for paths that a shell would cut: the script for containers has all of them bare."""
    for key, text in settings.items():
        if found := re.search(r"[^\w@%+=:,./#-]", text):
            raise InputError(
                f"{key}: {text!r} has {found[0]!r}, and nemo-run's script for containers quotes no path; allowed: "
                "letters, digits and @%+=:,./#-_"
            )
