"""`completion bash | zsh | fish`: a script that completes commands, options, choices and files in a shell."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHELLS = ("bash", "zsh", "fish")


def add(commands: Any) -> None:
    completion = commands.add_parser(
        "completion",
        help="print a script by which a shell completes this command line",
        example='eval "$(megatron-coreward completion bash)"',
    )
    completion.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    completion.set_defaults(run=_completion)


def _completion(options: argparse.Namespace) -> None:
    print(script(options.parser, options.shell), flush=True)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What a shell runs to complete the command line of a parser; whatever is a path is completed with files."""
    import shtab

    for action in _actions(parser):
        if action.type is Path:
            vars(action)["complete"] = shtab.FILE
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of a parser and of all commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
