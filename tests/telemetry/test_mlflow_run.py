"""MLflow itself, with its store of plain files: what the package wrote for a run, read back with its client."""

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.mlflow_run import MAX_PARAM_LENGTH, RUN_ID_FILE
from megatron_coreward.telemetry.sinks import open_sinks
from megatron_coreward.telemetry.trackers import read_missed

tracking = pytest.importorskip("mlflow.tracking")

pytestmark = [pytest.mark.timeout(200)]


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return (tmp_path / "server").as_uri()


def config_of(uri: str | None) -> dict[str, Any]:
    many = {f"key_{i}": i for i in range(150)}  # more than one request takes
    return {
        "seed": 3,
        "data": {"train_files": ["x" * 10_000]},
        "many": many,
        "telemetry": {"mlflow_experiment": "no labels", "mlflow_uri": uri},
    }


def write(run_dir: Path, uri: str | None, first_step: int, end: int, value: float = 0.5) -> list[str]:
    """Rows from one step up to another. Returns the warnings."""
    warnings: list[str] = []
    with open_sinks(run_dir, first_step=first_step, config=config_of(uri), warn=warnings.append) as sinks:
        for step in range(first_step, end):
            sinks.write(step, {"step_time_s": 1.0, "reward/mean": value, "update/grad_norm": float("nan")})
    return warnings


def history(client: Any, run_dir: Path, key: str) -> list[tuple[int, float]]:
    run_id = (run_dir / RUN_ID_FILE).read_text().strip()
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_a_run_has_its_rows_its_name_and_its_configuration(tmp_path: Path, uri: str) -> None:
    assert write(tmp_path / "first-try", uri, 0, 3) == []
    client = tracking.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("no labels")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first-try", "FINISHED")
    assert history(client, tmp_path / "first-try", "reward/mean") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert len(history(client, tmp_path / "first-try", "update/grad_norm")) == 3
    assert history(client, tmp_path / "first-try", "step") == []
    assert (run.data.params["seed"], run.data.params["many.key_149"]) == ("3", "149")
    assert len(run.data.params["data.train_files"]) == MAX_PARAM_LENGTH


def test_a_resumed_run_goes_on_in_the_same_one_and_the_later_value_of_a_step_is_its_newest(
    tmp_path: Path, uri: str
) -> None:
    run_dir = tmp_path / "run"
    assert write(run_dir, uri, 0, 3, 0.25) == write(run_dir, uri, 2, 4, 0.75) == []
    client = tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("no labels").experiment_id])
    assert run.info.status == "FINISHED"
    assert history(client, run_dir, "reward/mean") == [(0, 0.25), (1, 0.25), (2, 0.25), (2, 0.75), (3, 0.75)]


def test_the_environment_names_the_server_if_the_recipe_does_not(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"mlflow_experiment is 'no labels', but no server is named: set "):
        write(tmp_path / "run", None, 0, 1)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert write(tmp_path / "run", None, 0, 1) == []
    assert history(tracking.MlflowClient(tracking_uri=uri), tmp_path / "run", "reward/mean") == [(0, 0.5)]


def test_a_server_that_is_away_ends_no_run_and_gets_the_rows_once_it_is_back(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir = tmp_path / "run"
    (warning,) = write(run_dir, "http://127.0.0.1:9", 0, 2)  # nobody listens at this port
    assert warning.startswith("mlflow failed when it was opened (MlflowException: API request to http://127.0.0.1:9")
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [0, 1]
    assert read_missed(run_dir) == {"mlflow": 0}
    assert write(run_dir, uri, 2, 3) == []
    assert read_missed(run_dir) == {}
    client = tracking.MlflowClient(tracking_uri=uri)
    assert history(client, run_dir, "reward/mean") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert os.environ.get("MLFLOW_TRACKING_URI") is None  # the process's own MLflow is left alone
