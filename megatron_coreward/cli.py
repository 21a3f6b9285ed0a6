"""The command line: `megatron-coreward COMMAND`. Exit status 0 ok, 1 failed run, 2 bad input, 3 halted by its guard."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from megatron_coreward import __version__
from megatron_coreward.commands import (
    completion,
    config,
    convert,
    demo,
    evaluate,
    forecast,
    launch,
    plan,
    prepare_data,
    rephrase,
    report,
    train,
    verify_sync,
)
from megatron_coreward.commands.arguments import Parser
from megatron_coreward.errors import HaltedError, InputError, RunError, environment_problem
from megatron_coreward.telemetry.untrusted_text import say

COMMANDS: tuple[ModuleType, ...] = (
    demo,
    prepare_data,
    rephrase,
    config,
    plan,
    forecast,
    train,
    launch,
    evaluate,
    report,
    verify_sync,
    convert,
    completion,
)
_RUNS = ("train", "demo")  # the commands that train: of the others none says that a run has failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs the command; returns the exit status."""
    options = parse(arguments)
    what = "the run" if options.command in _RUNS else f"`{options.command}`"
    try:
        options.run(options)
    except InputError as e:
        say(f"error: {e}", sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        say("; ".join(["interrupted", *getattr(e, "__notes__", [])]), sys.stderr)
        return 1
    except HaltedError as e:
        say(f"the run is halted: {e}", sys.stderr)
        return 3
    except RunError as e:
        say(f"{what} failed: {e}", sys.stderr)
        return 1
    except BrokenPipeError:  # who read what is printed (`head`, a pager) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        say(f"{what} failed: {_in_words(e)}", sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line. One that no command takes ends the process with status 2."""
    parser = make_parser()
    options, more = parser.parse_known_args(arguments)
    if more:  # key=value behind an option, which argparse does not count to those before it
        taken = getattr(options, "overrides", None)
        if taken is None or any(argument.startswith("-") for argument in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        taken += more
    return options


def _in_words(error: Exception) -> str:
    """One line about an error that nobody expected, with its traceback above unless it is plainly the machine's."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        line = environment_problem(error)
    else:
        say(traceback.format_exc().rstrip("\n"), sys.stderr)
        line = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return "; ".join([line, *getattr(error, "__notes__", [])])


def console() -> NoReturn:
    """The command line as a process. Once its work is done, a scheduler's signal no longer changes its exit status."""
    status = main()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # unloading torch and Ray takes a second
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="megatron-coreward",
        description="Co-rewarding: reinforcement learning for LLM reasoning without labels.",
        example="megatron-coreward demo",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    for command in COMMANDS:
        command.add(commands)
    parser.set_defaults(parser=parser)  # for the command that describes them all to a shell
    return parser
