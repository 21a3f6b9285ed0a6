"""The end of a run: what is still to be there once its steps are done, and completing it, however often it takes.

final checkpoint -> hf/ -> report.html -> what trackers missed

Each of them appears whole or not at all. A run that was interrupted, killed or met an error between two of them is
completed by the same command: from the model on with the actors (`run.train`), afterwards without any process
(`complete`). None of what comes after the model can make a run a failed one.

Invariants (tests/trainer/test_finish.py): whatever is missing behind the last step is written by the next call;
nothing that is there is written again.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_coreward.checkpoint.store import saved_steps
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.report.report import write_report
from megatron_coreward.telemetry.jsonl import FILE_NAME
from megatron_coreward.telemetry.sinks import trackers_of
from megatron_coreward.telemetry.trackers import bring_missed, read_missed

MODEL, REPORT = "hf", "report.html"


def is_trained(config: RunConfig) -> bool:
    """Whether all steps are done and the final model is there."""
    steps = saved_steps(config.run_dir)
    return bool(steps) and steps[-1] >= config.steps and final_model_is_whole(config.run_dir)


def final_model_is_whole(run_dir: Path) -> bool:
    """Whether the final model is there with all files that its index names."""
    folder = run_dir / MODEL
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    try:
        names = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(names) and all((folder / name).is_file() for name in names)


def missing(config: RunConfig) -> list[str]:
    """What a run that is trained lacks."""
    lacks = [] if (config.run_dir / REPORT).is_file() else [REPORT]
    used = {tracker.name for tracker in trackers_of(config.run_dir, config.model_dump(mode="json"))}
    return lacks + [f"rows of {name}" for name in sorted(used & set(read_missed(config.run_dir)))]


def only_completes(config: RunConfig) -> bool:
    """Whether all that a call of the run has left to do is what `complete` does: it takes no device and no data."""
    return is_trained(config) and bool(missing(config))


def complete(config: RunConfig, notify: Callable[[str], None]) -> None:
    """Writes what is missing, without any process; `notify` is called for what cannot be written."""
    if not (config.run_dir / REPORT).is_file():
        try_report(config, notify)
    if read_missed(config.run_dir):
        trackers = trackers_of(config.run_dir, config.model_dump(mode="json"))
        for line in bring_missed(config.run_dir, config.run_dir / FILE_NAME, trackers, notify):
            notify(line)


@contextmanager
def nothing_after_it_counts(config: RunConfig, notify: Callable[[str], None]) -> Iterator[None]:
    """An error that comes when the final model is written, as processes leave, say, is reported and fails no run."""
    try:
        yield
    except Exception as error:
        if not is_trained(config):  # it was not when the block began: a run that is trained is not begun
            raise
        notify(f"the run is complete; what came after it: {type(error).__name__}: {error}")


def try_report(config: RunConfig, notify: Callable[[str], None]) -> None:
    """The run's page. All that it shows is kept beside it: an error here is only reported."""
    try:
        write_report(config.run_dir)
    except Exception as error:
        reason = str(error) if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: {error}"
        notify(f"report.html was not written: {reason}; `megatron-coreward report {config.run_dir}` tries again")
