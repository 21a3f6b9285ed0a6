"""What the launcher makes of a RayJob's status, and how it submits one again."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_coreward.config.load import load_config
from megatron_coreward.errors import RunError
from megatron_coreward.launch.job import make_job
from megatron_coreward.launch.kubernetes import Kubernetes, _outcome, _volume_names
from megatron_coreward.launch.settings import KubernetesCluster
from tests.launch.arguments import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def kubernetes(tmp_path: Path) -> Kubernetes:
    pytest.importorskip("kubernetes", reason="the Python package kubernetes is not installed")
    job = make_job(load_config(write_recipe(tmp_path), ["run_dir=/runs/one"]), None, 2, 8, None)
    return Kubernetes(job, KubernetesCluster(kind="kubernetes", image="image", claims={"runs": "/runs"}))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ({}, None),
        ({"jobStatus": "PENDING", "jobDeploymentStatus": "Initializing"}, None),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}, None),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, "finished"),
        (
            {"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code 75, ..."},
            "stopped",
        ),
        ({"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code -9, ..."}, "stopped"),
        ({"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code 1, ..."}, "failed"),
        ({"jobStatus": "FAILED", "message": "Job entrypoint command failed with exit code 2, ..."}, "failed"),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "stopped"),
        ({"jobDeploymentStatus": "Suspended"}, None),
        ({"jobStatus": "FAILED", "jobDeploymentStatus": "Retrying", "message": "exit code 1"}, "failed"),
        ({"jobStatus": None, "jobDeploymentStatus": "Waiting"}, None),
        ({"jobDeploymentStatus": "ValidationFailed"}, "failed"),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Complete"}, "failed"),
        ({"jobStatus": "LOST", "jobDeploymentStatus": "Running"}, "failed"),
        ({"jobStatus": "", "jobDeploymentStatus": "SomethingNew"}, "failed"),
    ],
)
def test_a_status(status: dict[str, Any], kind: str | None) -> None:
    outcome = _outcome(status)
    assert (None if outcome is None else outcome.kind) == kind


def test_a_refused_ray_job_ends_the_wait_with_kuberays_words() -> None:
    outcome = _outcome(
        {
            "jobDeploymentStatus": "ValidationFailed",
            "reason": "ValidationFailed",
            "message": "The RayJob metadata is invalid: RayJob name should be no more than 47 characters",
        }
    )
    assert outcome is not None
    assert outcome.detail.startswith("state ValidationFailed: ")
    assert outcome.detail.endswith("RayJob name should be no more than 47 characters")


def test_a_poll_reads_the_status(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "_get", lambda: {"status": {"jobStatus": "SUCCEEDED"}})
    outcome = kubernetes.poll("one-coreward")
    assert outcome is not None
    assert outcome.kind == "finished"


def test_every_claim_has_a_volume_whose_name_a_pod_takes() -> None:
    claims = ["runs", "models.v2", "shared-memory", "claim-0", "c" * 80]
    names = _volume_names(claims)
    assert names["runs"] == "runs"
    assert names["claim-0"] == "claim-0"
    assert len(set(names.values())) == len(claims)
    assert "shared-memory" not in names.values()  # which the pod's own volume has
    assert all("." not in name and len(name) <= 63 for name in names.values())


def test_a_deleted_ray_job_was_cancelled(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "_get", lambda: None)
    outcome = kubernetes.poll("one-coreward")
    assert outcome is not None
    assert outcome.kind == "cancelled"


def test_the_old_ray_job_leaves_before_the_new_one_comes(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []

    class Client:
        api: Any

        def stop(self) -> None:
            events.append("stop")

        def create_namespaced_custom_object(self, **what: Any) -> None:
            events.append((what["plural"], what["namespace"], what["body"]))

    client = Client()
    client.api = client
    kubernetes._client = client
    monkeypatch.setattr(kubernetes, "_get", lambda: None if "stop" in events else {"status": {}})
    assert kubernetes.submit() == "one-coreward"
    assert events == ["stop", ("rayjobs", "default", kubernetes.manifest)]


def test_the_log_is_shown_once(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["2026-01-01T00:00:01Z one", "2026-01-01T00:00:02Z two"]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/kubectl")
    asked: list[list[str]] = []

    def kubectl(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, "\n".join(lines), "")

    monkeypatch.setattr(subprocess, "run", kubectl)
    assert kubernetes.new_log("one-coreward") == "one\ntwo"
    lines.append("2026-01-01T00:00:03Z three")
    assert kubernetes.new_log("one-coreward") == "three"
    assert "job-name=one-coreward" in asked[0]
    assert "--since-time=2026-01-01T00:00:02Z" in asked[1]


@pytest.mark.parametrize(("status", "outcome"), [(500, None), (503, None), (429, None), (404, "cancelled")])
def test_a_server_that_does_not_answer_is_asked_again(
    kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch, status: int, outcome: str | None
) -> None:
    from kubernetes.client.exceptions import ApiException

    def get_namespaced_custom_object(**_: object) -> None:
        raise ApiException(status=status, reason="because")

    api = SimpleNamespace(get_namespaced_custom_object=get_namespaced_custom_object)
    monkeypatch.setattr(Kubernetes, "_backend", SimpleNamespace(api=api))
    found = kubernetes.poll("one-coreward")
    assert (None if found is None else found.kind) == outcome


def test_a_refusal_ends_the_wait(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.client.exceptions import ApiException

    def get_namespaced_custom_object(**_: object) -> None:
        raise ApiException(status=403, reason="Forbidden")

    api = SimpleNamespace(get_namespaced_custom_object=get_namespaced_custom_object)
    monkeypatch.setattr(Kubernetes, "_backend", SimpleNamespace(api=api))
    with pytest.raises(RunError, match="refuses RayJob .*Forbidden"):
        kubernetes.poll("one-coreward")
