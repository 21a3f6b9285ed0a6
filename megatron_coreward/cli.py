"""The command line: `megatron-coreward COMMAND`. Exit status 0 ok, 1 failed run, 2 bad input, 3 halted by its guard."""

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megatron_coreward import __version__
from megatron_coreward.commands import (
    config,
    convert,
    demo,
    evaluate,
    launch,
    plan,
    prepare_data,
    rephrase,
    report,
    train,
    verify_sync,
)
from megatron_coreward.commands.arguments import Parser
from megatron_coreward.errors import HaltedError, InputError, RunError

COMMANDS: tuple[ModuleType, ...] = (
    demo,
    prepare_data,
    rephrase,
    config,
    plan,
    train,
    launch,
    evaluate,
    report,
    verify_sync,
    convert,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs the command; returns the exit status."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more:  # key=value behind an option, which argparse does not count to those before it
        taken = getattr(options, "overrides", None)
        if taken is None or any(argument.startswith("-") for argument in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        taken += more
    try:
        options.run(options)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except HaltedError as e:
        print(f"the run is halted: {e}", file=sys.stderr)
        return 3
    except RunError as e:
        print(f"the run failed: {e}", file=sys.stderr)
        return 1
    except Exception as e:
        traceback.print_exc()
        last_line = (str(e).strip().splitlines() or [""])[-1]
        message = "; ".join([f"{type(e).__name__}: {last_line}", *getattr(e, "__notes__", [])])
        print(f"the run failed: {message}", file=sys.stderr)
        return 1
    return 0


def console() -> NoReturn:
    """The command line as a process. Once its work is done, a scheduler's signal no longer changes its exit status."""
    status = main()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # unloading torch and Ray takes a second
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="megatron-coreward", description="Co-rewarding: reinforcement learning for LLM reasoning without labels."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command in COMMANDS:
        command.add(commands)
    return parser
