"""What a cluster's file may not ask of `sbatch`: options that the launcher sets, and a time limit that leaves no time.

A job that goes on by itself rests on them: one job (no array) whose steps get SIGTERM before the limit, whose output
and exit status lie where the launcher looks, and which is put back into the queue by its own script.
"""

import re
from collections.abc import Iterator

from megatron_coreward.errors import InputError
from megatron_coreward.launch.settings import SlurmCluster, seconds

_KEYS = ("account", "partition", "qos", "constraint", "exclusive", "cpus-per-task", "mem", "time")  # of the file
_ARGUMENTS = {
    "nodes": "--nodes",
    "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "gpus-per-task": "--gpus-per-node",
    "job-name": "--name",
}
_REASONS = {
    "array": "each of its jobs would train in the same run directory",
    "chdir": "the scripts name all paths from the root; workdir is where relative ones begin",
    "error": "the job's output is read where the launcher puts it",
    "no-requeue": "a preempted job could not go on",
    "ntasks": "a node runs one task",
    "ntasks-per-node": "a node runs one task",
    "open-mode": "a job that goes on adds to its output",
    "output": "the job's output is read where the launcher puts it",
    "parsable": "the launcher sets it",
    "requeue": "the launcher sets it",
    "signal": "training would not be asked to save; stop_before_s says how long before the limit it is",
    "test-only": "--dry-run shows what would be submitted",
    "wait": "the launcher waits itself, and shows the log meanwhile",
    "wrap": "the launcher has a script of its own",
}
_OWN = (*_KEYS, *_ARGUMENTS, *_REASONS)
SIGNAL_SLACK_S = 60  # Slurm may send its signal so much earlier


def check_options(cluster: SlurmCluster, time: str | None) -> None:
    """Args:
        time: of `--time`; None: the file's.

    Raises:
        InputError: every setting that would undo one of the launcher's, with the reason.
    """
    problems = [f"sbatch.{key}: {problem}" for key, value in cluster.sbatch.items() for problem in _option(key, value)]
    limit = time or cluster.time
    if seconds(limit) <= cluster.stop_before_s + SIGNAL_SLACK_S:
        problems.append(
            f"{'--time' if time else 'time'}: {limit} is no longer than stop_before_s, {cluster.stop_before_s} s, and "
            f"the {SIGNAL_SLACK_S} s by which Slurm's signal may come early: the job would be asked to stop when it "
            "begins, and go back into the queue again and again"
        )
    if problems:
        raise InputError("\n".join(problems))


def _option(key: str, value: str) -> Iterator[str]:
    name = key.replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z-]+", name):
        yield "expected the long name of an option without dashes before it, such as reservation"
        return
    if any(ord(letter) < 32 for letter in value):
        yield f"found {value!r}; allowed: no control characters"
    whole = [own for own in _OWN if own == name] or [own for own in _OWN if own.startswith(name)]
    if not whole:
        return
    own = whole[0]
    short = "" if own == name else f"short for {own}; "
    if own in _KEYS:
        yield f"{short}the file has a key of its own for it: {own.replace('-', '_')}"
    elif own in _ARGUMENTS:
        yield f"{short}the launch command has an option for it: {_ARGUMENTS[own]}"
    else:
        yield f"{short}not to be set: {_REASONS[own]}"
