"""`demo`: a small model, trained without labels, here and now."""

import argparse
from pathlib import Path
from typing import Any, get_args

from megatron_coreward.commands.arguments import SEED, whole
from megatron_coreward.config.method_names import MethodName
from megatron_coreward.errors import InputError


def add(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small model without labels on this machine, without a download",
        example="megatron-coreward demo --method co_rewarding_ii --seed 2",
    )
    demo.add_argument("--method", choices=get_args(MethodName), default="co_rewarding_i", help="method to train with")
    demo.add_argument(
        "--compare",
        action="store_true",
        help="train with every method on the same budget, and draw all of them in one picture",
    )
    demo.add_argument(
        "--study",
        choices=("stability", "rephrasing", "methods"),
        help="run a study of many runs, which can be resumed: methods by learning rates and seeds, damaged "
        "rephrasings, or the methods of later papers",
    )
    demo.add_argument("--methods", nargs="+", default=(), help="methods of the study of stability; default: all seven")
    demo.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=(),
        help="learning rates of the study of stability; default: all three",
    )
    demo.add_argument("--seeds", nargs="+", type=whole(0, SEED), default=(), help="seeds of a study; default: all")
    demo.add_argument(
        "--recorded", type=Path, help="draw a study from this directory of recorded runs, without running anything"
    )
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="directory to write into")
    demo.add_argument("--seed", type=whole(0, SEED), default=1, help="random seed of weights, data and rollouts")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    _check(options)
    from megatron_coreward.demo.run import compare, demo
    from megatron_coreward.demo.study_results import run_study, show

    if options.study and options.recorded:
        show(options.study, options.recorded, options.run_dir / options.study / f"{options.study}.png")
    elif options.study:
        run_study(options.study, options.run_dir, options.methods, options.rates, options.seeds)
    elif options.compare:
        compare(options.run_dir, options.seed, options.overrides)
    else:
        demo(options.method, options.run_dir, options.seed, options.overrides)


def _check(options: argparse.Namespace) -> None:
    """Options that belong together. Raises InputError."""
    of_a_study = {f"--{name}": getattr(options, name) for name in ("methods", "rates", "seeds", "recorded")}
    given = [name for name, value in of_a_study.items() if value]
    if given and not options.study:
        raise InputError(
            f"{', '.join(given)}: found without --study; allowed: with --study stability, rephrasing or methods"
        )
    if options.study and options.overrides:
        raise InputError(f"--study: found with {options.overrides[0]}; allowed: no overrides, for all runs are alike")
