"""Where the metrics of a run go: metrics.jsonl, which a run cannot do without, and trackers, which it can.

A resumed run writes its steps from `first_step` on once more. Each place makes sure that a reader sees one history: the
metrics file drops the rows from there on, TensorBoard hides them, and Weights & Biases and MLflow go on in the same
run. An error of the metrics file ends the run; none of a tracker does (`trackers`).
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.telemetry.jsonl import FILE_NAME, JsonlSink
from megatron_coreward.telemetry.mlflow_run import Mlflow
from megatron_coreward.telemetry.trackers import GuardedTracker, Tracker


class Sink(Protocol):
    """Takes one row of metrics a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores or shows the metrics of one step. Steps grow from call to call."""

    def close(self) -> None:
        """Stores what is still held back, and lets go of files and connections. A second call does nothing."""


class TensorBoard:
    """TensorBoard event files, one tag a metric, through TensorBoard's own writer (torch's would import torch)."""

    def __init__(self, directory: Path, first_step: int = 0) -> None:
        self._writer = EventFileWriter(str(directory))
        if first_step > 0:
            # TensorBoard hides what earlier files of the directory hold from this step on.
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=key, simple_value=value) for key, value in metrics.items() if key != keys.STEP]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases: of the package, `init`, `define_metric`, `log` and `finish` are all that is used.

    The run's id is kept in `wandb_id` of the run directory, so that a resumed run goes on in the same one. Metrics are
    plotted over our own step: W&B's counter refuses to go back, as a run that resumes does.
    """

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=_wandb_id(run_dir / "wandb_id"),
            resume="allow",
            dir=str(run_dir),
            config=dict(config),
        )
        self._run.define_metric(keys.STEP)
        self._run.define_metric("*", step_metric=keys.STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, keys.STEP: step})

    def finish(self) -> None:
        self._run.finish()


def trackers_of(run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run: TensorBoard in its directory, and those that its `telemetry` keys name.

    `config` is the run's configuration, resolved and nested; W&B and MLflow show it.
    """
    telemetry: Mapping[str, Any] = config.get("telemetry") or {}
    project, experiment = telemetry.get("wandb_project"), telemetry.get("mlflow_experiment")
    trackers = [Tracker("tensorboard", lambda first_step: TensorBoard(run_dir / "tensorboard", first_step))]
    if project is not None:
        trackers.append(Tracker("wandb", lambda first_step: Wandb(project, run_dir, config)))
    if experiment is not None:
        uri = telemetry.get("mlflow_uri")
        trackers.append(Tracker("mlflow", lambda first_step: Mlflow(experiment, uri, run_dir, config)))
    return trackers


def require_trackers(config: Mapping[str, Any]) -> None:
    """Raises InputError if a tracker that the configuration names cannot be opened at all.

    It imports and asks nothing of the trackers' packages: call it before a run starts.
    """
    telemetry: Mapping[str, Any] = config.get("telemetry") or {}
    for key, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
        if telemetry.get(key) is not None and importlib.util.find_spec(package) is None:
            raise InputError(
                f"telemetry.{key} is {telemetry[key]!r}, but the package {package} is not installed: "
                f"pip install 'megatron-coreward[trackers]', or leave telemetry.{key} out"
            )
    nowhere = telemetry.get("mlflow_uri") is None and not os.environ.get("MLFLOW_TRACKING_URI")
    if telemetry.get("mlflow_experiment") is not None and nowhere:
        raise InputError(
            f"telemetry.mlflow_experiment is {telemetry['mlflow_experiment']!r}, but no server is named: set "
            "telemetry.mlflow_uri or MLFLOW_TRACKING_URI, to http://HOST:PORT for example"
        )


class SinkGroup:
    """Several sinks as one. An error of a sink is the group's; closing closes every sink, whatever fails on the way."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        _close_all(self._sinks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_sinks(
    run_dir: Path,
    *,
    first_step: int,
    config: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> SinkGroup:
    """The sinks of a run: metrics.jsonl, and its trackers.

    `first_step` is the first step that will be written (0 for a new run that validates before training); rows from
    there on that an earlier attempt wrote are replaced. `config` is the run's configuration, which names its trackers
    and is what they show. `warn` takes a line for people about a tracker that fails.
    """
    config = config or {}
    require_trackers(config)
    metrics_file = run_dir / FILE_NAME
    sinks: list[Sink] = [JsonlSink(metrics_file, first_step)]
    for tracker in trackers_of(run_dir, config):
        sinks.append(GuardedTracker(tracker, run_dir, metrics_file, first_step, warn))
    return SinkGroup(sinks)


def _close_all(sinks: Sequence[Sink]) -> None:
    """Closes in order, the next one even if one fails; an error carries those before it as its context."""
    if sinks:
        try:
            sinks[0].close()
        finally:
            _close_all(sinks[1:])


def _wandb_id(path: Path) -> str:
    if not path.exists():
        with replaced_whole(path) as temporary:
            temporary.write_text(uuid4().hex[:12] + "\n")
    return path.read_text().strip()
