"""How all commands read their arguments: options by their whole names, numbers within bounds, defaults in the help."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_EXAMPLE = "example:\n  "


class _Formatter(argparse.HelpFormatter):
    """Says the default of an option that has one, unless its help does."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        says_nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        if not action.option_strings or says_nothing or "default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """An example stays in its line, so that it can be copied."""
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser, its commands' parsers included, that takes no option by the beginning of its name.

    One command's `--gpus` would be another's `--gpus-per-node` otherwise.
    """

    def __init__(self, *, example: str | None = None, **settings: Any) -> None:
        """`example` is a whole command line, which is shown at the end of the help."""
        epilog = None if example is None else f"{_EXAMPLE}{example}"
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Formatter, "epilog": epilog, **settings})
        self.example = example


class FormerOption(argparse.Action):
    """An option under its former name: refused with the present one, which is its `const`. Not in the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str) -> None:
        super().__init__(
            option_strings, dest, nargs="?", const=const, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]}: this option is called {self.const} now")


SEED = 2**32 - 1  # the largest that all random number generators take


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of arguments: whole numbers from `least` on, up to `most`."""
    allowed = f"{least} or more" + ("" if most is None else f", at most {most}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
        return value

    return read


def number(*, above: float | None = None, least: float | None = None, most: float = math.inf) -> Callable[[str], float]:
    """A type of arguments: finite numbers above `above`, or from `least` on, up to `most`."""
    lower = f"above {above:g}" if above is not None else f"{least:g} or more"
    allowed = lower + ("" if most == math.inf else f", at most {most:g}")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        bounded = (above is None or value > above) and (least is None or value >= least) and value <= most
        if not math.isfinite(value) or not bounded:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
        return value

    return read
