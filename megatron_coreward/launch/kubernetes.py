"""Kubernetes, through nemo-run's `KubeRayExecutor`: a KubeRay RayJob with a small head pod and N pods with GPUs.

The executor writes the cluster's part of the manifest. The RayJob around it is written here and not by nemo-run's
`RayJob`, which needs a cluster even to show a manifest and knows no time limit; its client and its deletion are used.
The attempt runs in the head pod, reads its recipe from an environment variable, and its exit status is in the RayJob's
message.
"""

import itertools
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from megatron_coreward.errors import InputError, RunError
from megatron_coreward.launch import scripts
from megatron_coreward.launch.job import SUFFIX, Job, check_gpu, is_inside
from megatron_coreward.launch.settings import KubernetesCluster, seconds
from megatron_coreward.launch.supervise import Outcome, exit_outcome

_RESOURCE = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
GONE_AFTER_S = 300.0  # until a deleted RayJob has left
SHARED_MEMORY = "shared-memory"  # name of a pod's volume

# States of a RayJob (KubeRay 1.0 to 1.5) in which it waits or runs; in any other it has ended.
_ALIVE = {"", "New", "Initializing", "Running", "Suspending", "Suspended", "Retrying", "Waiting"}
_JOB_ALIVE = {"", "PENDING", "RUNNING"}


class Unreachable(RunError):
    """The API server does not answer; a later look may find it."""


class Kubernetes:
    """One RayJob."""

    def __init__(self, job: Job, cluster: KubernetesCluster) -> None:
        try:
            from nemo_run.core.execution.kuberay import KubeRayExecutor, KubeRayWorkerGroup
        except ImportError:
            raise InputError(
                "launch kubernetes needs the Python package kubernetes: pip install 'nemo-run[ray]'"
            ) from None
        run_dir = PurePosixPath(job.config.run_dir)
        if not is_inside(cluster.workdir / run_dir, cluster.claims.values()):
            raise InputError(
                f"run_dir: {run_dir} is in no volume of `claims`, and would be lost with its pod; allowed: a path "
                f"under {', '.join(cluster.claims.values())}"
            )
        check_gpu(job.config, {f"node_selector.{key}": value for key, value in cluster.node_selector.items()})
        self.job, self.cluster = job, cluster
        if len(set(cluster.claims.values())) < len(cluster.claims):
            raise InputError(f"claims: two volumes are mounted at one path; found {', '.join(cluster.claims.values())}")
        memory = {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}}
        names = _volume_names(list(cluster.claims))
        claims = [{"name": names[claim], "persistentVolumeClaim": {"claimName": claim}} for claim in cluster.claims]
        mounts = [{"name": names[claim], "mountPath": mount} for claim, mount in cluster.claims.items()]
        self._executor = KubeRayExecutor(
            namespace=cluster.namespace,
            ray_version=cluster.ray_version,
            image=cluster.image,
            head_cpu=cluster.head_cpu,
            head_memory=cluster.head_memory,
            volumes=[*claims, memory],
            volume_mounts=[*mounts, {"name": SHARED_MEMORY, "mountPath": "/dev/shm"}],
            worker_groups=[
                KubeRayWorkerGroup(
                    group_name="worker",
                    replicas=job.nodes,
                    gpus_per_worker=job.gpus_per_node or None,
                    cpu_requests=cluster.worker_cpu,
                    cpu_limits=cluster.worker_cpu,
                    memory_requests=cluster.worker_memory,
                    memory_limits=cluster.worker_memory,
                )
            ],
            spec_kwargs=self._pod(),
            container_kwargs={"env": self._environment(), "workingDir": str(cluster.workdir)},
        )
        self.manifest = self._manifest()
        self._client: Any = None
        self._since: str | None = None

    def preview(self) -> str:
        return f"# kubectl create -f -\n{_yaml(self.manifest)}".rstrip()

    def submit(self) -> str:
        if self._get() is not None:
            self._backend.stop()
            end = time.monotonic() + GONE_AFTER_S
            while self._get() is not None:
                if time.monotonic() > end:
                    raise RunError(f"RayJob {self._name} was deleted {GONE_AFTER_S:.0f} s ago and is still there")
                time.sleep(2)
        self._since = None
        self._backend.api.create_namespaced_custom_object(
            **_RESOURCE, namespace=self.cluster.namespace, body=self.manifest
        )
        return self._name

    def poll(self, job: str) -> Outcome | None:
        try:
            found = self._get()
        except Unreachable:
            return None
        if found is None:
            return Outcome("cancelled", "somebody has deleted the RayJob")
        return _outcome(found.get("status") or {})

    def new_log(self, job: str) -> str:
        """Of the pod that submits the entrypoint; KubeRay gives it the RayJob's name as a label."""
        words = ["kubectl", "logs", "-n", self.cluster.namespace, "-l", f"job-name={job}", "--timestamps", "--tail=-1"]
        words += [] if self._since is None else [f"--since-time={self._since}"]
        if shutil.which(words[0]) is None:
            raise InputError("launch kubernetes shows logs with kubectl, which is not in PATH; or use --detach")
        try:
            text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout
        except subprocess.TimeoutExpired:
            return ""  # the next look has it
        lines = [line.partition(" ") for line in text.splitlines()]
        new = [(stamp, line) for stamp, _, line in lines if self._since is None or stamp > self._since]
        self._since = new[-1][0] if new else self._since
        return "\n".join(line for _, line in new)

    def interrupted(self, job: str) -> str:
        if not job:
            return f"interrupted while {self.job.name} was submitted; the queue shows whether it was"
        return (
            f"RayJob {job} continues without this launcher; kubectl delete rayjob {job} -n {self.cluster.namespace} "
            "ends it, and without a launcher nobody submits it again"
        )

    @property
    def _name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def _backend(self) -> Any:
        """nemo-run's view of the RayJob; made when it is needed, for it reads the kubeconfig."""
        if self._client is None:
            from nemo_run.run.ray.kuberay import KubeRayJob

            try:
                self._client = KubeRayJob(name=self.job.name, executor=self._executor)
            except Exception as e:
                raise InputError(f"launch kubernetes: no cluster to talk to ({e})") from None
            self._client.job_name = self._name
        return self._client

    def _get(self) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return self._backend.api.get_namespaced_custom_object(
                **_RESOURCE, namespace=self.cluster.namespace, name=self._name
            )
        except ApiException as e:
            if e.status == 404:
                return None
            if e.status is None or e.status == 429 or e.status >= 500:
                raise Unreachable(f"Kubernetes does not answer for RayJob {self._name}: {e.reason}") from None
            raise RunError(f"Kubernetes refuses RayJob {self._name}: {e.reason}") from None
        except HTTPError as e:
            raise Unreachable(f"Kubernetes does not answer for RayJob {self._name}: {e}") from None

    def _manifest(self) -> dict[str, Any]:
        c = self.cluster
        spec = self._executor.get_cluster_body(f"{self.job.name}-cluster")["spec"]
        attempt = shlex.join(scripts.attempt_command(c.python, None, {}, None))
        limit = self.job.time or c.time
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": f"{self.job.name}{SUFFIX}", "namespace": c.namespace},
            "spec": {
                "entrypoint": attempt,
                "shutdownAfterJobFinishes": True,
                **({} if limit is None else {"activeDeadlineSeconds": seconds(limit)}),
                "runtimeEnvYAML": _yaml({"env_vars": {scripts.CONFIG_VARIABLE: self.job.config_text}}),
                "rayClusterSpec": spec,
            },
        }

    def _environment(self) -> list[dict[str, Any]]:
        c = self.cluster
        plain = {**scripts.RAY_ENVIRONMENT, **c.env}
        return [
            *({"name": name, "value": value} for name, value in plain.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": secret.secret, "key": secret.key}}}
                for name, secret in c.secrets.items()
            ),
        ]

    def _pod(self) -> dict[str, Any]:
        c = self.cluster
        parts = {
            "nodeSelector": c.node_selector,
            "tolerations": list(c.tolerations),
            "serviceAccountName": c.service_account,
            "imagePullSecrets": [{"name": name} for name in c.image_pull_secrets],
        }
        return {name: part for name, part in parts.items() if part}


class _Readable(yaml.SafeDumper):
    """Texts of several lines as they are, and no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _yaml(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Readable, sort_keys=False, width=200)


def _volume_names(claims: list[str]) -> dict[str, str]:
    """A name for the volume of each claim: the claim's, unless that is none for a volume (which takes no dots)."""
    names: dict[str, str] = {}
    for claim in claims:
        name = claim
        if "." in claim or len(claim) > 63 or claim == SHARED_MEMORY:
            name = next(n for place in itertools.count() if (n := f"claim-{place}") not in {*claims, *names.values()})
        names[claim] = name
    return names


def _outcome(status: Mapping[str, Any]) -> Outcome | None:
    """How a RayJob ended, by its status; None while it waits or runs."""
    job, deployment = str(status.get("jobStatus") or ""), str(status.get("jobDeploymentStatus") or "")
    message = str(status.get("message") or "")
    if job == "SUCCEEDED":
        return exit_outcome(0, "")
    if job in _JOB_ALIVE and deployment in _ALIVE:
        return None
    if status.get("reason") == "DeadlineExceeded":
        return Outcome("stopped", "its time limit")
    if job in ("FAILED", "STOPPED") or deployment == "Failed":
        code = re.search(r"exit code (-?\d+)", message)
        return exit_outcome(int(code[1]) if code else None, message or "the pod of the Ray head has gone")
    reason = status.get("reason")
    why = "; ".join(str(part) for part in (reason, message) if part) or "it gives no message"
    return Outcome("failed", f"state {deployment or job}: {why}")
