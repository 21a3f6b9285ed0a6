"""Studies on the demo's task: a grid of runs from the same starts on one budget, each of which can be left and gone on.

    megatron-coreward demo --study stability --methods majority_voting co_rewarding_i --rates 1e-4 --seeds 1 2

RUN_DIR/stability/<arm>/lr-0.0001/seed-1/ is a run directory like any other. A cell of the grid that has its final model
is done and is not run again; one that was cut off begins again, for a cell takes minutes. The order of the cells makes a
part of the grid useful: one seed of all arms comes before the next seed.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.schema import MethodName, RunConfig
from megatron_coreward.demo.run import demo_config, demo_splits, write_start
from megatron_coreward.demo.task import Files, write_parquet
from megatron_coreward.errors import InputError
from megatron_coreward.trainer.run import train

STEPS = 225
TRAINED_QUESTIONS = 256  # of the demo's 512: an epoch is 32 steps
SETTINGS = (
    f"steps={STEPS}",
    "data.batch_size=8",
    "actor.tensor_parallel=1",
    "actor.data_parallel=2",
    "actor.tokens_per_microbatch=1024",
    "validation.every=15",
    "validation.samples=random",
    "validation.n=2",
    "guard.anchors=64",
    "guard.anchor_every=8",
)


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: a method, and settings that make it another one."""

    method: MethodName
    overrides: tuple[str, ...] = ()


ARMS: Mapping[str, Arm] = {
    "ground_truth": Arm("ground_truth"),
    "majority_voting": Arm("majority_voting"),
    "co_rewarding_i": Arm("co_rewarding_i"),
    "co_rewarding_ii": Arm("co_rewarding_ii"),
    "entropy": Arm("entropy"),
    "self_certainty": Arm("self_certainty"),
    "co_rewarding_ii_without_ema": Arm("co_rewarding_ii", ("teacher.decay_start=0", "teacher.decay_end=0")),
}
RATES = (1e-4, 2e-4, 5e-5)  # the demo's own rates and twice the higher one; the middle one comes first
SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    arm: str
    rate: float
    seed: int

    def run_dir(self, directory: Path) -> Path:
        return directory / self.arm / f"lr-{self.rate:g}" / f"seed-{self.seed}"


def grid(arms: Sequence[str] = (), rates: Sequence[float] = (), seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells in the order of running; what is not given is all of it. Raises InputError for an unknown arm."""
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"--methods: found {arm!r}; allowed: {', '.join(ARMS)}")
    return [
        Cell(arm, rate, seed) for seed in seeds or SEEDS for rate in rates or RATES for arm in arms or ARMS
    ]


def run_stability(run_dir: Path, cells: Iterable[Cell], run: Callable[[RunConfig], object] = train) -> None:
    """Runs the cells that are not done."""
    console = Console()
    try:
        for config in _pending(console, run_dir, cells):
            run(config)
    finally:
        stop_ray()


def _pending(console: Console, run_dir: Path, cells: Iterable[Cell]) -> Iterator[RunConfig]:
    for cell in cells:
        target = cell.run_dir(run_dir / "stability")
        if (target / "hf" / "config.json").is_file():
            continue
        shutil.rmtree(target, ignore_errors=True)
        yield _config(console, run_dir, cell, target)


def _config(console: Console, run_dir: Path, cell: Cell, target: Path) -> RunConfig:
    splits = demo_splits(cell.seed)
    data = run_dir / "stability" / f"data-{cell.seed}"
    data.mkdir(parents=True, exist_ok=True)
    files: Files = write_parquet(data, replace(splits, train=splits.train[:TRAINED_QUESTIONS]))
    start = write_start(console, run_dir, cell.seed, splits)
    arm = ARMS[cell.arm]
    overrides = (*SETTINGS, f"actor.lr={cell.rate:g}", f"run_dir={target}", *arm.overrides)
    return demo_config(arm.method, start, files, run_dir, cell.seed, overrides)
