"""What runs inside a job: one attempt at the training, and an exit status that says how it ended.

`python -m megatron_coreward.attempt CONFIG` trains in this very process, so a scheduler's signal reaches the
training itself. Exit status:

0     the run is finished: all steps are done and the final model is there
75    it is not, and to run it again is what it needs: it was asked to stop and has saved, or it failed after progress
else  as `train` has it: 1 failed (without a checkpoint that was not there before), 2 bad input, 3 halted by its guard

A failure after progress counts as 75 because lost nodes look like that; without progress it would fail again.
"""

import argparse
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_coreward import cli
from megatron_coreward.checkpoint.store import checkpoint_path, saved_steps
from megatron_coreward.config.load import load_config
from megatron_coreward.config.paths import expand_path
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.launch.scripts import CONFIG_VARIABLE
from megatron_coreward.telemetry.untrusted_text import say
from megatron_coreward.trainer.finish import is_trained, missing

FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
_PR_SET_PDEATHSIG = 1


def _checkpoints(config: RunConfig) -> set[tuple[int, int]]:
    """Those that are there: a run that went back writes the same steps again, which is progress."""
    steps = saved_steps(config.run_dir)
    return {(step, checkpoint_path(config.run_dir, step).stat().st_mtime_ns) for step in steps}


def attempt(path: Path) -> int:
    """Trains until the run is finished, fails or is asked to stop; returns the exit status."""
    try:
        config = load_config(path)
    except InputError as e:
        say(f"error: {e}", sys.stderr)
        return BAD_INPUT
    if is_trained(config) and not missing(config):
        say(f"the run in {config.run_dir} is finished")
        return FINISHED
    before = _checkpoints(config)
    status = cli.main(["train", str(path)])
    if is_trained(config):
        return FINISHED
    progress = bool(_checkpoints(config) - before)
    if status == 0 or (status == FAILED and progress):
        return STOPPED
    return status


def read_secrets(references: Sequence[str]) -> None:
    """Puts the content of files into the environment; each reference is NAME=file.

    Raises:
        InputError: a file cannot be read.
    """
    for reference in references:
        name, _, file = reference.partition("=")
        try:
            os.environ[name] = expand_path(file).read_text().strip()
        except OSError as e:
            raise InputError(f"secret {name}: {file}: {e.strerror}") from None
        except ValueError as e:
            raise InputError(f"secret {name}: {file}: {e}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_coreward.attempt")
    parser.add_argument("config", type=Path, nargs="?", help=f"default: the text in {CONFIG_VARIABLE}")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--status-file", type=Path, help="where the exit status is written as well")
    options = parser.parse_args(arguments)
    if options.status_file is not None:
        options.status_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = options.config
        try:
            if path is None:
                if CONFIG_VARIABLE not in os.environ:
                    raise InputError(f"no config: name a file or set {CONFIG_VARIABLE}")
                path = Path(folder) / "config.yaml"
                path.write_text(os.environ[CONFIG_VARIABLE])
            read_secrets(options.secret)
            status = attempt(path)
        except InputError as e:
            say(f"error: {e}", sys.stderr)
            status = BAD_INPUT
    if options.status_file is not None:
        partial = options.status_file.with_suffix(".partial")
        partial.write_text(f"{status}\n")
        os.replace(partial, options.status_file)
    return status


if __name__ == "__main__":
    # Who started us may be killed outright; then nobody must go on writing into the run directory.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    sys.exit(main())
