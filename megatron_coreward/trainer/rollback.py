"""Going back: a run that the guard stops in a collapse goes on from a checkpoint older than its first indicators.

RUN/rollbacks.jsonl holds one line each time, `{"from": 57, "to": 40, "reason": ...}`. How often a run went back is no
part of its checkpoints: the one that it goes back to must not forget it.
"""

import json
import os
import shutil
from pathlib import Path

from megatron_coreward.checkpoint.store import TrainerState, checkpoint_path, saved_steps
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.guard import Decision, Guard
from megatron_coreward.telemetry.files import fsync_directory, writing
from megatron_coreward.telemetry.rollout_dump import discard_rollouts

FILE_NAME = "rollbacks.jsonl"


class Collapsing(RunError):
    """The guard has decided to go back or to stop."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(str(decision))
        self.decision = decision


def count_rollbacks(run_dir: Path) -> int:
    """How often this run has gone back. A part of a line that a kill left does not count."""
    path = run_dir / FILE_NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def open_guard(config: RunConfig, state: TrainerState | None) -> Guard:
    """The guard of an attempt, as it was when the state was saved; None: at the beginning of a run."""
    guard = Guard(config.guard, rollbacks=count_rollbacks(config.run_dir))
    if state is not None and state.guard is not None:
        guard.load_state_dict(state.guard)
    return guard


def roll_back(run_dir: Path, decision: Decision) -> int:
    """Makes the newest checkpoint from before the indicators the newest of all, and forgets what was sampled after it.

    Later checkpoints stay as `collapsed_step_000050`, for people to look at. The rollouts of later steps are removed:
    they were drawn from weights that will not come again. It is on disk that the run went back before anything is
    moved, so a kill in between counts a rollback too many rather than none.

    Returns:
        The step to go on from.

    Raises:
        RunError: no checkpoint is old enough; nothing is touched.
    """
    saved = saved_steps(run_dir)
    good = [step for step in saved if step <= decision.good_step]
    if not good:
        have = f"those of steps {', '.join(map(str, saved))} are later" if saved else "there is none"
        raise RunError(
            f"{decision} Cannot go back: a checkpoint of step {decision.good_step} or earlier is needed, and {have} "
            "(checkpoint.every, checkpoint.keep)"
        )
    line = json.dumps({"from": decision.step, "to": good[-1], "reason": decision.reason})
    with writing(run_dir / FILE_NAME), (run_dir / FILE_NAME).open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    discard_rollouts(run_dir, good[-1] + 1)  # first: rollouts of weights that will not come again must not be used
    for step in saved:
        if step > good[-1]:
            path = checkpoint_path(run_dir, step)
            aside = path.with_name(f"collapsed_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
    fsync_directory(run_dir / "checkpoints")
    return good[-1]
