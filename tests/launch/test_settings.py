"""Cluster files: what is shipped loads, what is wrong is one message with the key and what is allowed."""

from pathlib import Path

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.launch.settings import (
    KubernetesCluster,
    LocalCluster,
    SecretFile,
    SkyPilotCluster,
    SlurmCluster,
    load_cluster,
)
from tests.launch.arguments import CLUSTERS

MODELS = {"local": LocalCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster, "skypilot": SkyPilotCluster}


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_files_load(path: Path) -> None:
    cluster = load_cluster(MODELS[path.stem.split("-")[0]], path)
    assert cluster.kind == path.stem.split("-")[0]


def test_secrets_are_references_only(tmp_path: Path) -> None:
    cluster = load_cluster(SlurmCluster, CLUSTERS / "slurm.yaml")
    assert isinstance(cluster.secrets["WANDB_API_KEY"], SecretFile)
    path = tmp_path / "c.yaml"
    path.write_text("kind: slurm\nsecrets: {TOKEN: abc123}\n")
    with pytest.raises(InputError, match="secrets.TOKEN"):
        load_cluster(SlurmCluster, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: slurm\npartitoin: gpu\n", "unknown key 'partitoin'; did you mean 'partition'"),
        ("kind: slurm\nssh: {host: a, user: b, port: 1}\n", "unknown key 'ssh.port'"),
        ("kind: slurm\ntime: 4h\n", r"time: expected \[days-\]hours:minutes:seconds, .*found '4h'"),
        ("kind: slurm\nmounts: [data]\n", "mounts.0: expected /on/the/host:/in/the/container, found 'data'"),
        ("kind: slurm\nenv: {lower: x}\n", "named in capitals"),
        ("kind: slurm\nenv: {RAY_AUTH_MODE: x}\n", "the launcher sets this variable itself"),
        ("kind: slurm\nsecrets: {MEGATRON_COREWARD_CONFIG: {file: x}}\n", "the launcher sets this variable itself"),
        ("kind: slurm\nenv: {A: x}\nsecrets: {A: {file: x}}\n", "A is in env and in secrets; allowed: one of them"),
        ("kind: slurm\ntime: '0-00:00:00'\n", "time: some schedulers read a limit of 0 as no limit"),
        ("kind: slurm\nstop_before_s: 0\n", "stop_before_s"),
        ("kind: kubernetes\nimage: x\n", "kind is 'kubernetes', and launch slurm needs kind: slurm"),
        ("[1]\n", "expected keys and values, found list"),
        ("{", "not valid YAML"),
        ("kind: slurm\nenv:\n  A: x\n  A: y\n", "line 4: key 'A' is there already, in line 3"),
        ("kind: slurm\nenv:\n\tA: x\n", "line 3, column 1: a tab is used for indentation"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        load_cluster(SlurmCluster, path)
    assert str(path) in str(raised.value)


def test_paths_are_expanded_once_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "cluster.yaml"
    path.write_text("kind: slurm\nworkdir: $SCRATCH/work\njob_dir: $SCRATCH/jobs\npython: ~/venv/bin/python\n")
    cluster = load_cluster(SlurmCluster, path)
    assert (str(cluster.workdir), str(cluster.job_dir)) == ("/scratch/me/work", "/scratch/me/jobs")
    assert cluster.python == "/home/me/venv/bin/python"
    path.write_text("kind: slurm\nssh: {host: a, user: b, identity: ~/.ssh/key}\nworkdir: /w\njob_dir: /j\n")
    ssh = load_cluster(SlurmCluster, path).ssh
    assert ssh is not None
    assert ssh.identity == "/home/me/.ssh/key"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("job_dir: $NOT_SET_ANYWHERE/jobs\n", "job_dir: the environment variable NOT_SET_ANYWHERE is not set"),
        (
            "ssh: {host: a, user: b}\njob_dir: ~/jobs\n",
            "job_dir: a path where the job runs, .*'~/jobs'",
        ),
        ("image: x\npython: $VENV/bin/python\n", "python: a path where the job runs"),
    ],
)
def test_a_path_that_nothing_would_expand_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"kind: slurm\n{text}")
    with pytest.raises(InputError, match=f"{path}: {message}"):
        load_cluster(SlurmCluster, path)


def test_text_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "kind: slurm\ntime: 12:00:00\naccount: 010\nqos: off\nmem: 400\nenv: {LEVEL: 1.50, YES: yes}\n"
        "sbatch: {begin: 2026-01-01}\nworkdir: ~/work\n"
    )
    cluster = load_cluster(SlurmCluster, path)
    assert (cluster.time, cluster.account, cluster.qos, cluster.mem) == ("12:00:00", "010", "off", "400")
    assert cluster.env == {"LEVEL": "1.50", "YES": "yes"}
    assert cluster.sbatch == {"begin": "2026-01-01"}
    assert str(cluster.workdir) == "~/work"  # of the cluster's own home directory


def test_without_a_file_slurm_has_its_defaults_and_kubernetes_asks_for_one(tmp_path: Path) -> None:
    assert load_cluster(SlurmCluster, None).time == "04:00:00"
    with pytest.raises(InputError, match="launch kubernetes without --cluster: key 'image' is missing"):
        load_cluster(KubernetesCluster, None)
    with pytest.raises(InputError, match="absent.yaml does not exist"):
        load_cluster(SlurmCluster, tmp_path / "absent.yaml")
