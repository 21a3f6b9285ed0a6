"""Studies on the demo's task: many runs from the same starts on one budget, one after the other.

RUN_DIR/<study>/<what is compared>/seed-1/ is a run directory like any other. A cell of a study that has its final model
is done and is not run again, unless its settings are others now; one that was cut off begins again, for a cell takes
minutes. So a study is left and gone on by the same command.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.methods import MethodName
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.demo.run import demo_config, demo_splits, write_start
from megatron_coreward.demo.task import Files, Question, write_parquet
from megatron_coreward.trainer.run import train
from megatron_coreward.trainer.run_directory import changed_keys

# Settings that may be others without a cell being another: a study may have been moved.
PLACES = ("run_dir", "model.hf_path", "data.train_files", "data.rephrased_files", "data.val_files")
TRAINED_QUESTIONS = 256  # of the demo's 512: an epoch is 32 steps
# Of every cell: a third of the demo's batch, because a study is many runs.
SETTINGS = (
    "data.batch_size=8",
    "actor.tensor_parallel=1",
    "actor.data_parallel=2",
    "actor.tokens_per_microbatch=1024",
    "validation.samples=random",
    "validation.n=2",
)


def _as_they_are(questions: list[Question]) -> list[Question]:
    return questions


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    name: str  # what is compared: a path below the study's directory
    seed: int
    method: MethodName
    overrides: tuple[str, ...]
    prepare: Callable[[list[Question]], list[Question]] = _as_they_are  # what becomes of the training questions

    def run_dir(self, directory: Path) -> Path:
        """Its run directory, below that of the study."""
        return directory / self.name / f"seed-{self.seed}"

    def config(self, run_dir: Path, target: Path) -> RunConfig:
        """What it trains with, from the demo's `run_dir`, in `target`."""
        overrides = (*SETTINGS, *self.overrides, f"run_dir={target}")
        start, files = run_dir / f"start-{self.seed}", Files.below(target / "data")
        return demo_config(self.method, start, files, run_dir, self.seed, overrides)

    def is_done(self, run_dir: Path, study: str) -> bool:
        """Whether the final model is there, which a run writes last, and was trained by the settings of today."""
        target = self.run_dir(run_dir / study)
        saved = target / "config.yaml"
        if not saved.is_file() or not (target / "hf" / "config.json").is_file():
            return False
        changed = changed_keys(saved, self.config(run_dir, target))
        return all(key.split()[0] in PLACES for key in changed)


def run_cells(
    run_dir: Path,
    study: str,
    cells: Iterable[Cell],
    run: Callable[[RunConfig], object] = train,
    done: Callable[[Cell, Path], object] = lambda cell, target: None,
) -> list[Path]:
    """Runs the cells that are not done, and returns the run directories of all of them.

    Args:
        run_dir: the demo's, which has the models that training starts from.
        done: called with each cell and its run directory as soon as it is done, so that a study that is left keeps it.
    """
    console, directory, run_dirs = Console(), run_dir / study, []
    try:
        for cell in cells:
            target = cell.run_dir(directory)
            run_dirs.append(target)
            if not cell.is_done(run_dir, study):
                shutil.rmtree(target, ignore_errors=True)
                console.print(f"{study}: {cell.name}, seed {cell.seed}")
                run(cell_config(console, run_dir, cell, target))
            done(cell, target)
    finally:
        stop_ray()
    return run_dirs


def cell_config(console: Console, run_dir: Path, cell: Cell, target: Path) -> RunConfig:
    """The configuration of a cell, after its data and its start have been written."""
    splits = demo_splits(cell.seed)
    data = target / "data"
    data.mkdir(parents=True)
    trained = cell.prepare(list(splits.train[:TRAINED_QUESTIONS]))
    write_parquet(data, replace(splits, train=tuple(trained)))
    write_start(console, run_dir, cell.seed, splits)
    return cell.config(run_dir, target)
