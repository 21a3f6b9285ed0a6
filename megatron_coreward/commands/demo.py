"""`demo`: a small model, trained without labels, here and now."""

import argparse
from pathlib import Path
from typing import Any, get_args

from megatron_coreward.commands.arguments import SEED, whole
from megatron_coreward.config.schema import MethodName


def add(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model without labels, here and now, with no download",
        example="megatron-coreward demo --method co_rewarding_ii --seed 2",
    )
    demo.add_argument("--method", choices=get_args(MethodName), default="co_rewarding_i", help="of training")
    demo.add_argument(
        "--compare", action="store_true", help="run every method on the same budget and draw them together"
    )
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    demo.add_argument("--seed", type=whole(0, SEED), default=1, help="of weights, data and rollouts")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from megatron_coreward.demo.run import compare, demo

    if options.compare:
        compare(options.run_dir, options.seed, options.overrides)
    else:
        demo(options.method, options.run_dir, options.seed, options.overrides)
