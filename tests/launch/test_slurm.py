"""On a real Slurm, started here (controller and node daemon): a job is submitted, preempted, requeued, and resumes."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from megatron_coreward.checkpoint.store import saved_steps
from megatron_coreward.telemetry.jsonl import read_rows
from tests.launch.arguments import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(1200)]

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
DAEMONS = ("munged", "slurmctld", "slurmd")
STEPS = 16


def wait_for(what: str, seconds: float, done: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class SlurmHere:
    """A cluster of one node, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.env = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        controller, node = free_ports(2)
        (folder / "slurm.conf").write_text(
            f"""ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )

    def start(self) -> None:
        folder = self.folder
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = ("munge.key", "munge.socket", "munged.pid", "munged.log", "munge.seed")
        self._daemon("munged", "-F", "--force", *(f"--{n}={folder / f}" for n, f in zip(names, files, strict=True)))
        wait_for("munged", 30, (folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        wait_for("an idle node", 60, lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False))

    def stop(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=check)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        pairs = (word.partition("=") for word in self.run("scontrol", "show", "job", "-o", number).split())
        return {name: value for name, _, value in pairs}

    def _daemon(self, *words: str) -> None:
        log = (self.folder / f"{words[0]}.out").open("wb")
        self.daemons.append(subprocess.Popen(words, env=self.env, stdout=log, stderr=subprocess.STDOUT))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmHere]:
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"Slurm is not installed (no {', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd runs jobs as root only")
    cluster = SlurmHere(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from megatron_coreward.demo.model import write_model
    from megatron_coreward.demo.task import make_splits, write_parquet
    from megatron_coreward.demo.tokenizer import word_level_tokenizer

    write_parquet(tmp_path, make_splits(1, num_train=32, num_heldout=8, num_sft=8))
    size = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 128}
    write_model(tmp_path / "start", word_level_tokenizer(), **size)
    tree = {
        "run_dir": str(tmp_path / "run"),
        "steps": STEPS,
        "method": "majority_voting",
        "model": {"hf_path": str(tmp_path / "start"), "dtype": "float32"},
        "data": {
            "train_files": [str(tmp_path / "train.parquet")],
            "batch_size": 8,
            "max_prompt_tokens": 64,
            "system_prompt": None,
        },
        "actor": {"tokens_per_microbatch": 2048},
        "rollout": {"n": 4, "max_response_tokens": 32, "kv_cache_gib": 0.25},
        "checkpoint": {"every": 4},
        "telemetry": {"console": "plain"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    cluster = {
        "kind": "slurm",
        "stop_before_s": 60,
        "object_store_gib": 0.5,
        "env": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    return path


def test_a_preempted_job_requeues_itself_and_goes_on_to_the_end(slurm: SlurmHere, recipe: Path) -> None:
    run_dir, said = recipe.parent / "run", recipe.parent / "launcher.out"
    words = ["slurm", str(recipe), "--cluster", str(recipe.parent / "cluster.yaml"), "--time", "01:00:00"]
    with said.open("wb") as file:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.arguments", *words],
            cwd=ROOT,
            env=slurm.env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:

        def reached(step: int) -> bool:
            assert launcher.poll() is None, said.read_text()
            metrics = run_dir / "metrics.jsonl"
            return metrics.exists() and any(int(row["step"]) >= step for row in read_rows(metrics))

        wait_for("step 2", 400, lambda: reached(2))
        (number,) = slurm.run("squeue", "-h", "-o", "%A").split()
        slurm.run("scancel", "--signal=TERM", number)  # as for preemption, and before the time limit
        wait_for("the job is back in the queue", 120, lambda: slurm.job(number)["JobState"] == "PENDING")
        stopped_after = saved_steps(run_dir)[-1]
        assert 2 <= stopped_after < STEPS
        # Slurm lets a requeued job wait for two minutes.
        slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        assert launcher.wait(600) == 0, said.read_text()
    finally:
        if launcher.poll() is None:
            launcher.kill()
    text = said.read_text()
    assert f"in the queue: {number}" in text
    assert text.count("in the queue:") == 1
    assert f"resumed after step {stopped_after}" in text
    assert text.rstrip().endswith("finished: all steps are done")
    assert slurm.job(number)["Restarts"] == "1"
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row["step"]] == list(range(1, STEPS + 1))
    assert (run_dir / "hf" / "model.safetensors").is_file()
    assert not list(Path("/tmp").glob(f"coreward-ray-{os.getuid()}-{number}-*"))


def test_bad_input_ends_the_job_and_is_not_tried_again(slurm: SlurmHere, recipe: Path) -> None:
    words = ["slurm", str(recipe), f"model.hf_path={recipe.parent / 'absent'}", "--cluster"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.arguments", *words, str(recipe.parent / "cluster.yaml")],
        cwd=ROOT,
        env=slurm.env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "failed: exit status 2" in done.stderr
    assert str(recipe.parent / "absent") in done.stdout  # what the job printed is shown
    assert done.stdout.count("in the queue:") == 1
