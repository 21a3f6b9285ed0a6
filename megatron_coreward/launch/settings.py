"""What a cluster is: account, image, mounts, environment and secrets, from a small file. Unknown keys are errors.

Secrets are references only: a file that is read inside the job, or a key of a Kubernetes secret. Their values appear
in no script, no manifest and no log.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator

from megatron_coreward.config.component import Component, Positive
from megatron_coreward.config.explain import explain
from megatron_coreward.config.paths import expand_path
from megatron_coreward.config.yaml_file import read_yaml
from megatron_coreward.errors import InputError

# What the launcher and the executors set for their own scripts; set otherwise, a job finds no Ray, no recipe or no end.
OWN_VARIABLES = frozenset(
    {
        "COREWARD_RAY_HEAD",
        "MEGATRON_COREWARD_CONFIG",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "SLURM_JOB_ID",
        "SLURM_NODEID",
        "SLURM_RESTART_COUNT",
        "TORCHX_MAX_RETRIES",
    }
)


def _environment_name(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError("an environment variable is named in capitals, digits and underscores")
    if name in OWN_VARIABLES:
        raise ValueError("the launcher sets this variable itself")
    return name


def time_limit(text: str) -> str:
    """Raises ValueError if `text` is no time limit."""
    if not re.fullmatch(r"(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d", text):
        raise ValueError("expected [days-]hours:minutes:seconds, such as 04:00:00")
    if not seconds(text):
        raise ValueError("some schedulers read a limit of 0 as no limit; expected more than 0")
    return text


def seconds(limit: str) -> int:
    """Of a time limit."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _folder(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("expected an absolute path")
    return _there(text)


def _there(text: str) -> str:
    if "$" in text or text.startswith("~"):
        raise ValueError("a path where the job runs, and nothing expands it there; expected one without ~ and $")
    return text


def _here(text: str) -> str:
    return str(expand_path(text))


def _claim_name(text: str) -> str:
    if len(text) > 253 or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", text):
        raise ValueError("the name of a volume claim has lower-case letters, digits, dashes and dots only")
    return text


def _mount(text: str) -> str:
    source, _, target = text.partition(":")
    if not source.startswith("/") or not target.startswith("/"):
        raise ValueError("expected /on/the/host:/in/the/container")
    return text


EnvironmentName = Annotated[str, AfterValidator(_environment_name)]
TimeLimit = Annotated[str, AfterValidator(time_limit)]
Mount = Annotated[str, AfterValidator(_mount)]
Folder = Annotated[str, AfterValidator(_folder)]
Here = Annotated[str, AfterValidator(_here)]  # a path on the machine that launches
There = Annotated[str, AfterValidator(_there)]  # a path where the job runs
ClaimName = Annotated[str, AfterValidator(_claim_name)]


class SecretFile(Component):
    file: PurePosixPath  # read inside the job, where the training runs


class SecretKey(Component):
    secret: str  # name of the Kubernetes secret
    key: str


class LocalCluster(Component):
    kind: Literal["local"] = "local"
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    secrets: dict[EnvironmentName, SecretFile] = Field(default_factory=dict)
    python: Here | None = None  # null: the one that launches


class SSH(Component):
    host: str
    user: str
    identity: Here | None = None  # file of the private key; null: what the SSH agent has


class SlurmCluster(Component):
    kind: Literal["slurm"] = "slurm"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    cpus_per_task: Positive | None = None  # a node runs one task
    mem: str | None = None  # a node, such as 400G
    time: TimeLimit = "04:00:00"
    stop_before_s: Positive = 300  # SIGTERM so long before the time limit: training saves and leaves
    sbatch: dict[str, str] = Field(default_factory=dict)  # further options, such as {reservation: maintenance}
    image: str | None = None  # for Pyxis, such as nvcr.io#nvidia/pytorch:25.06-py3 or a .sqsh file; null: no container
    mounts: tuple[Mount, ...] = ()
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    secrets: dict[EnvironmentName, SecretFile] = Field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines on every node before Ray starts, such as module load cuda
    ssh: SSH | None = None  # the login node; null: launch runs there
    python: str | None = None  # null: the one that launches, or that of the image
    workdir: PurePosixPath | None = None  # to which relative paths of the recipe refer; null: where launch is run
    job_dir: PurePosixPath | None = None  # job_dir/NAME has scripts and logs, seen by all nodes; null: run_dir/launch
    object_store_gib: Annotated[float, Field(gt=0)] | None = None  # Ray's, a node; null: Ray's choice

    @field_validator("python", "workdir", "job_dir")
    @classmethod
    def _expand(cls, value: Any, info: ValidationInfo) -> Any:
        """Paths of a cluster that shares its files with the machine that launches are expanded there, once.

        A workdir's leading `~/` is the home directory on the node, where the script changes to it.
        """
        text, key = str(value), str(info.field_name)
        if value is None or (key == "workdir" and text.startswith("~/") and "$" not in text):
            return value
        elsewhere = info.data.get("ssh") or (key == "python" and info.data.get("image"))
        return type(value)(_there(text) if elsewhere else _here(text))


class KubernetesCluster(Component):
    kind: Literal["kubernetes"]
    image: str
    namespace: str = "default"
    claims: dict[ClaimName, Folder] = Field(
        min_length=1
    )  # persistent volume claim -> where it is mounted; run_dir is in one
    shared_memory: str = "64Gi"  # of /dev/shm, a pod
    head_cpu: str = "4"
    head_memory: str = "32Gi"
    worker_cpu: str | None = None
    worker_memory: str | None = None
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[dict[str, Any], ...] = ()
    service_account: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    time: TimeLimit | None = None
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    secrets: dict[EnvironmentName, SecretKey] = Field(default_factory=dict)
    python: There = "python"
    workdir: PurePosixPath = PurePosixPath("/workspace")
    ray_version: str = "2.60.0"


class SkyPilotCluster(Component):
    kind: Literal["skypilot"]
    infra: str | None = None  # such as k8s/my-context or aws/us-east-1; null: SkyPilot's choice
    gpus: str | None = None  # such as H100
    image: str | None = None  # such as docker:registry.example.org/coreward:gpu
    cpus: Positive | None = None
    memory: Positive | None = None  # GB
    use_spot: bool = True
    storage: dict[str, dict[str, Any]] = Field(min_length=1)  # where it is mounted -> SkyPilot's description of it
    files: dict[str, Here] = Field(default_factory=dict)  # in the job -> here
    env: dict[EnvironmentName, str] = Field(default_factory=dict)
    secrets: dict[EnvironmentName, SecretFile] = Field(default_factory=dict)
    setup: tuple[str, ...] = ()
    python: There = "python"
    workdir: PurePosixPath = PurePosixPath("~/sky_workdir")


Cluster = TypeVar("Cluster", LocalCluster, SlurmCluster, KubernetesCluster, SkyPilotCluster)


def load_cluster(model: type[Cluster], path: Path | None) -> Cluster:
    """Reads a cluster's file; without one, every setting has its default.

    Raises:
        InputError: naming the file and the key, what was found and what is allowed.
    """
    kind = model.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    tree: Any = {"kind": kind}
    if path is not None:
        tree = read_yaml(path, "--cluster:")
        if tree.get("kind") != kind:
            raise InputError(f"{path}: kind is {tree.get('kind')!r}, and launch {kind} needs kind: {kind}")
    where = str(path) if path is not None else f"launch {kind} without --cluster"
    try:
        cluster = model.model_validate(tree)
    except ValidationError as e:
        raise InputError(explain(where, model, e)) from None
    if both := cluster.env.keys() & cluster.secrets.keys():
        raise InputError(f"{where}: {min(both)} is in env and in secrets; allowed: one of them")
    return cluster
