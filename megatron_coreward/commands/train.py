"""`train CONFIG [key=value ...]`: a training run from a config file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coreward.telemetry.untrusted_text import say

if TYPE_CHECKING:
    from megatron_coreward.config.schema import RunConfig


def add(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train as a recipe says",
        example="megatron-coreward train configs/math_co_rewarding_i.yaml run_dir=runs/first actor.lr=1e-6",
    )
    train.add_argument("config", type=Path, metavar="CONFIG", help="the recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, such as actor.lr=1e-5")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the run and show its settings, memory, processes and files, without starting anything",
    )
    train.set_defaults(run=_train)


def _only_completes(config: "RunConfig") -> bool:
    """Whether a finished run lacks its report or rows of its trackers alone."""
    from megatron_coreward.preflight.resume import newest_checkpoint

    try:
        if newest_checkpoint(config.run_dir) is None:
            return False
    except OSError:
        return False  # preflight says what is wrong with the path
    from megatron_coreward.trainer import finish

    return finish.only_completes(config)


def _train(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.preflight import preflight

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from megatron_coreward.commands.dry_run import describe_run

        print(describe_run(config), flush=True)
    arch = None
    if options.dry_run or not _only_completes(config):
        arch = preflight(config)  # before torch and Ray are imported, which takes longer than all of its checks
    if options.dry_run:
        print("\npreflight found nothing wrong; nothing was started and nothing was written")
        return

    from megatron_coreward.cluster.preemption import Preempted
    from megatron_coreward.trainer.run import train

    try:
        say(f"done: {train(config, arch)}")
    except Preempted as request:  # it did what it was asked to do: status 0
        say(str(request))
