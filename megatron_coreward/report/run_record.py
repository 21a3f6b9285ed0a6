"""What a run directory holds, read for people who look at it later, perhaps on another machine.

Only the parts of `config.yaml` that are asked for are read as settings, and the rest stays text: a run of another
version of this package, or one whose model and data are elsewhere, can still be looked at.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_coreward.config.names import with_new_names
from megatron_coreward.errors import InputError, environment_problem
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.jsonl import FILE_NAME, Row, read_rows
from megatron_coreward.telemetry.rollout_dump import dumped_steps

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as it lies on disk."""

    run_dir: Path
    config: Mapping[str, Any]  # config.yaml as it was resolved; empty if there is none
    config_text: str
    rows: list[Row]  # of metrics.jsonl, in order
    dumps: Mapping[int, Path]  # step -> its rollouts
    events: tuple[str, ...]  # lines of events.log
    rollbacks: tuple[Mapping[str, Any], ...] = ()  # lines of rollbacks.jsonl: from, to, reason

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def steps(self) -> list[Row]:
        """The rows of training steps: without the validation before training."""
        return [row for row in self.rows if row[keys.STEP] != 0]

    def known_keys(self) -> set[str]:
        """The metrics with a finite value in some row."""
        return {key for row in self.rows for key, value in row.items() if value is not None}

    def settings(self, component: str, model: type[Settings]) -> Settings:
        """A component of the configuration, defaults if the run's version did not have it.

        Raises InputError for a component that this version does not understand.
        """
        tree = self.config.get(component) or {}
        try:
            return model.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([component, *map(str, first["loc"])])
            raise InputError(f"{self.run_dir / 'config.yaml'}: {where}: {first['msg']}") from None


def load_record(run_dir: Path) -> RunRecord:
    """Reads a run directory, which a run may still be writing.

    Raises InputError if it is none: no metrics, or files of another form.
    """
    metrics = run_dir / FILE_NAME
    if not metrics.is_file():
        raise InputError(f"{metrics}: no such file; a run directory (run_dir of a training run) is expected")
    try:
        rows = read_rows(metrics)
    except OSError as error:
        raise InputError(environment_problem(error, metrics)) from None
    if not rows:
        raise InputError(f"{metrics}: no step has been written yet")
    text = _text(run_dir / "config.yaml")
    try:
        config = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{run_dir / 'config.yaml'}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise InputError(f"{run_dir / 'config.yaml'}: expected keys and values, found {type(config).__name__}")
    return RunRecord(
        run_dir=run_dir,
        config=with_new_names(config),
        config_text=text,
        rows=rows,
        dumps=dumped_steps(run_dir),
        events=tuple(_text(run_dir / "events.log").splitlines()),
        rollbacks=_rollbacks(run_dir / "rollbacks.jsonl"),
    )


def _rollbacks(path: Path) -> tuple[Mapping[str, Any], ...]:
    """Whole lines only: a part of one that a kill left does not count, nor does one that is damaged."""
    lines = [line for line in _text(path).splitlines(keepends=True) if line.endswith("\n")]
    rollbacks = []
    for line in lines:
        with suppress(ValueError):
            rollbacks.append(json.loads(line))
    return tuple(entry for entry in rollbacks if isinstance(entry, dict))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if path.is_file() else ""
    except OSError as error:
        raise InputError(environment_problem(error, path)) from None
