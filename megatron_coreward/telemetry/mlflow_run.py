"""A run at MLflow, through its client alone: `create_experiment`, `create_run`, `log_batch` and their kin.

The fluent interface (`mlflow.start_run`) is not used: it keeps the current run of the whole process.
"""

import importlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import replaced_whole

RUN_ID_FILE = "mlflow_run_id"  # in the run directory
MAX_PARAMS = 100  # of one request; MLflow refuses more
MAX_PARAM_LENGTH = 6000  # characters; MLflow refuses longer values


class Mlflow:
    """A run of an MLflow experiment. The configuration is its parameters, under dotted keys.

    The run's id is kept in `mlflow_run_id` of the run directory, so that a resumed run goes on in the same one. MLflow
    deletes no value: of a step that was done twice it keeps both, and shows the later one as the step's newest.
    """

    def __init__(self, experiment: str, uri: str | None, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Begins the run, or goes on in it.

        Args:
            experiment: name of the experiment, which is made if it does not exist.
            uri: the tracking server, None for that of the environment variable MLFLOW_TRACKING_URI.
            config: the run's configuration, nested.
        """
        self._entities = importlib.import_module("mlflow.entities")
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=uri)
        run_dir.mkdir(parents=True, exist_ok=True)
        file = run_dir / RUN_ID_FILE
        if file.exists():
            self._run_id = file.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if known is None else known.experiment_id
        self._run_id = self._client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        params = [self._entities.Param(key, text[:MAX_PARAM_LENGTH]) for key, text in _dotted(config)]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[begin : begin + MAX_PARAMS])
        with replaced_whole(file) as temporary:  # last: a run that lacks its parameters is not gone on with
            temporary.write_text(self._run_id + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        values = [self._entities.Metric(key, value, now, step) for key, value in metrics.items() if key != keys.STEP]
        self._client.log_batch(self._run_id, metrics=values)

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested mapping under dotted keys, as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
