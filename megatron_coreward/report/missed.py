"""Bringing to the trackers of a run what they missed while it went on."""

import fcntl
import os
from pathlib import Path

from megatron_coreward.report.run_record import load_record
from megatron_coreward.telemetry.jsonl import FILE_NAME
from megatron_coreward.telemetry.sinks import trackers_of
from megatron_coreward.telemetry.trackers import bring_missed, read_missed


def bring_to_trackers(run_dir: Path) -> list[str]:
    """What was brought or could not be, a line each; nothing if no tracker lacks anything.

    Raises InputError if `run_dir` is no run directory.
    """
    missed = read_missed(run_dir)
    if not missed:
        return []
    if is_training(run_dir):
        return [f"{', '.join(sorted(missed))}: what is missing can be added once the run in {run_dir} has ended"]
    warnings: list[str] = []
    trackers = trackers_of(run_dir, load_record(run_dir).config)
    return bring_missed(run_dir, run_dir / FILE_NAME, trackers, warnings.append) + warnings


def is_training(run_dir: Path) -> bool:
    """Whether a process of this cluster trains in a run directory; False on file systems without locks."""
    try:
        file = os.open(run_dir / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False
