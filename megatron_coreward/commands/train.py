"""`train CONFIG [key=value ...]`: a training run from a config file."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    train = commands.add_parser("train", help="train from a config file")
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, such as actor.lr=1e-5")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.preflight import preflight

    config = load_config(options.config, options.overrides)
    preflight(config)  # before torch and Ray are imported, which takes longer than all of its checks

    from megatron_coreward.cluster.preemption import Preempted
    from megatron_coreward.trainer.run import train

    try:
        print(f"done: {train(config)}")
    except Preempted as request:  # it did what it was asked to do: status 0
        print(request)
