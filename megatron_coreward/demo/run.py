"""The demo: generated word problems, a small model that is right about half of the time, then training without labels.

runs/demo/data-<seed>/     questions, rephrasings, held-out questions (parquet in the published format)
runs/demo/start-<seed>/    the warm-started model; kept, so that further methods start from the same one
runs/demo/<method>/        a run directory like any other, with curves.png
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.methods import MethodName
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.task import Files, Splits, make_splits, write_parquet
from megatron_coreward.demo.tokenizer import word_level_tokenizer
from megatron_coreward.demo.warm_start import warm_start
from megatron_coreward.telemetry.curves import draw_comparison, draw_run
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.keys import validation_keys
from megatron_coreward.trainer.run import train

COMPARED: tuple[MethodName, ...] = (  # the paper's
    "co_rewarding_i",
    "co_rewarding_ii",
    "co_rewarding_i+ii",
    "majority_voting",
    "ground_truth",
    "self_certainty",
    "entropy",
)

TRAIN_QUESTIONS = 512
HELD_OUT_QUESTIONS = 256
SFT_EXAMPLES = 12_000
MAX_SFT_STEPS = 1500
SFT_LOSS = 0.075  # nats a token: right about half of the time at temperature 1
RL_STEPS = 45
# Found by trial on seed 1: half the rate takes 75 steps to rise as far.
LEARNING_RATE = 1e-4


def demo(method: MethodName, run_dir: Path, seed: int, overrides: Sequence[str] = ()) -> Path:
    """Prepares the task and the model if they are missing, trains with one method, shows before and after.

    Returns:
        The run directory of the method.
    """
    console = Console()
    begin = time.monotonic()
    try:
        config = _prepare(console, method, run_dir, seed, overrides)
        train(config)
    finally:
        stop_ray()
    picture = draw_run(config.run_dir)
    _print_table(console, {method: config.run_dir})
    console.print(f"curves: {picture}\nmodel:  {config.run_dir / 'hf'}\n{time.monotonic() - begin:.0f} s in all")
    return config.run_dir


def compare(run_dir: Path, seed: int, overrides: Sequence[str] = ()) -> Path:
    """Trains with each of the paper's methods from the same start on the same budget; one picture, one table.

    Returns:
        The picture.
    """
    console = Console()
    runs: dict[str, Path] = {}
    try:
        for method in COMPARED:
            config = _prepare(console, method, run_dir, seed, overrides)
            train(config)
            runs[method] = config.run_dir
    finally:
        stop_ray()
    picture = draw_comparison(runs, run_dir / "comparison.png")
    _print_table(console, runs)
    console.print(f"curves: {picture}")
    return picture


def demo_config(
    method: MethodName, start: Path, files: Files, run_dir: Path, seed: int, overrides: Sequence[str]
) -> RunConfig:
    """What the demo trains with; `overrides` are those of `train`."""
    tree: dict[str, Any] = {
        "run_dir": str(run_dir / method),
        "seed": seed,
        "steps": RL_STEPS,
        "method": method,
        "model": {"hf_path": str(start), "dtype": "float32"},
        "data": {
            "train_files": [str(files.train)],
            "rephrased_files": [str(files.train_rephrased)],
            "val_files": [str(files.heldout)],
            "batch_size": 24,
            "max_prompt_tokens": 64,
            "system_prompt": None,
        },
        "actor": {  # on two cores: halves of a batch need one exchange a step, halves of a layer one each
            "data_parallel": 2,
            "tokens_per_microbatch": 2048,
            "lr": LEARNING_RATE,
            "lr_schedule": "constant",
        },
        "rollout": {"num_engines": 2, "max_response_tokens": 32, "kv_cache_gib": 0.25},
        "validation": {"every": 15},
        "guard": {"anchors": 32},
        "checkpoint": {"resume": "never"},
    }
    return parse_config(tree, overrides, where="demo")


def _prepare(console: Console, method: MethodName, run_dir: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    splits = demo_splits(seed)
    data = run_dir / f"data-{seed}"
    data.mkdir(parents=True, exist_ok=True)
    start = run_dir / f"start-{seed}"
    config = demo_config(method, start, write_parquet(data, splits), run_dir, seed, overrides)
    shutil.rmtree(run_dir / method, ignore_errors=True)  # of an earlier demo; a run_dir of the user's is left alone
    ahead = f"{config.steps} steps of {method} without labels (about 2 minutes), on two cores of a laptop"
    if (start / "config.json").is_file():
        console.print(f"next: {ahead}, from the model in {start}")
    else:
        console.print(f"next: a supervised warm start (about a minute), then {ahead}")
    write_start(console, run_dir, seed, splits)
    return config


def demo_splits(seed: int) -> Splits:
    """The demo's questions, in all their splits."""
    return make_splits(seed, TRAIN_QUESTIONS, HELD_OUT_QUESTIONS, SFT_EXAMPLES)


def write_start(console: Console, run_dir: Path, seed: int, splits: Splits) -> Path:
    """The model that training starts from: one that is there already, or random weights after a warm start."""
    random, start = run_dir / f"random-{seed}", run_dir / f"start-{seed}"
    if (start / "config.json").is_file():
        return start
    tokenizer = word_level_tokenizer()
    write_model(random, tokenizer, seed=seed)
    console.print(f"the task: {splits.train[0].texts['original']}")
    console.print(f"rephrased: {splits.train[0].texts['rephrased']}")
    with console.status("") as status:

        def show(step: int, loss: float) -> None:
            status.update(f"supervised warm start: step {step}, loss {loss:.3f}, until {SFT_LOSS}")

        begin = time.monotonic()
        steps = warm_start(
            random,
            start,
            tokenizer,
            splits.sft,
            max_steps=MAX_SFT_STEPS,
            target_loss=SFT_LOSS,
            seed=seed,
            on_step=show,
        )
    console.print(f"supervised warm start: {steps} steps in {time.monotonic() - begin:.0f} s")
    return start


def _print_table(console: Console, runs: Mapping[str, Path]) -> None:
    """A table that fits into 80 columns."""
    title = "accuracy on held-out questions in %, before and after training"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    ends = {name: _first_and_last(run_dir) for name, run_dir in runs.items()}
    columns = validation_keys(next(iter(ends.values()))[0])
    for key in columns:
        table.add_column(key.removeprefix("val/"), justify="right")
    for name, (before, after) in ends.items():
        cells = [f"{100 * before[k]:.1f} -> {100 * after[k]:.1f}\n{100 * (after[k] - before[k]):+.1f}" for k in columns]
        table.add_row(name, *cells)
    console.print(table)


def _first_and_last(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = [row for row in read_rows(run_dir / "metrics.jsonl") if validation_keys(row)]
    return rows[0], rows[-1]
