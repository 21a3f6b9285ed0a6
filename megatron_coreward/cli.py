"""The command line: `megatron-coreward COMMAND`. Exit status 0 ok, 1 failed run, 2 bad input."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megatron_coreward import __version__
from megatron_coreward.config.schema import MethodName
from megatron_coreward.errors import InputError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except RunError as e:
        print(f"the run failed: {e}", file=sys.stderr)
        return 1
    except Exception as e:
        traceback.print_exc()
        last_line = (str(e).strip().splitlines() or [""])[-1]
        print(f"the run failed: {type(e).__name__}: {last_line}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-coreward", description="Co-rewarding: reinforcement learning for LLM reasoning without labels."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small model without labels, here and now, with no download")
    demo.add_argument("--method", choices=get_args(MethodName), default="co_rewarding_i")
    demo.add_argument(
        "--compare", action="store_true", help="run every method on the same budget and draw them together"
    )
    demo.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="where everything is written")
    demo.add_argument("--seed", type=int, default=1)
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train from a config file")
    train.add_argument("config", type=Path, metavar="CONFIG")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, such as actor.lr=1e-5")
    train.set_defaults(run=_train)
    return parser


def _train(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.trainer.run import train

    print(f"done: {train(load_config(options.config, options.overrides))}")


def _demo(options: argparse.Namespace) -> None:
    from megatron_coreward.demo.run import compare, demo

    if options.compare:
        compare(options.run_dir, options.seed, options.overrides)
    else:
        demo(options.method, options.run_dir, options.seed, options.overrides)
