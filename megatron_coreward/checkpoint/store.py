"""The checkpoints of a run directory: each appears whole or not at all, the newest can be found, old ones go.

checkpoints/step_000010/megatron/        distributed checkpoint of the actors
checkpoints/step_000010/trainer.json     where the run stands
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_coreward.errors import InputError

_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands after a step. The data position is a function of the step."""

    step: int  # steps done
    num_updates: int  # optimizer steps done


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps with a whole checkpoint, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(run_dir: Path, position: Position, write_actors: Callable[[Path], None], keep: int) -> Path:
    """Writes a checkpoint beside its final place, moves it there in one step, and then removes all but `keep`.

    Args:
        write_actors: writes the actors' state into the directory that it is given, which exists and is empty.
    """
    final = checkpoint_path(run_dir, position.step)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "megatron").mkdir(parents=True)
    write_actors((partial / "megatron").resolve())
    (partial / "trainer.json").write_text(json.dumps(asdict(position)) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for step in saved_steps(run_dir)[:-keep]:
        shutil.rmtree(checkpoint_path(run_dir, step))
    return final


def load_checkpoint(run_dir: Path, step: int, read_actors: Callable[[Path], None]) -> Position:
    """Hands the actors their state and returns where the run stood.

    Raises:
        InputError: the checkpoint's description is missing or damaged.
    """
    path = checkpoint_path(run_dir, step)
    try:
        position = Position(**json.loads((path / "trainer.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{path}: damaged checkpoint ({e}); remove it to go on from the one before") from None
    read_actors((path / "megatron").resolve())
    return position
