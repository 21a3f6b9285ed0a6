"""`~` and `$VARIABLES` in paths: expanded once, on the machine that reads the configuration.

What comes out has nothing left to expand, so a resolved configuration means the same wherever it is read again.
"""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", re.ASCII)


def expand_path(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` and every `$NAME` and `${NAME}` replaced.

    Raises:
        ValueError: a variable is not set, a user is not known, the result would be expanded again, or it is no path
            that can be written down (text in UTF-8 without a null character).
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    text = _VARIABLE.sub(value, str(path))
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError:
            raise ValueError(f"there is no home directory for {text.partition('/')[0]}") from None
    if not text:
        raise ValueError("the path is empty")
    if text.startswith("~") or _VARIABLE.search(text):
        raise ValueError(f"expands to {text!r}, which has something to expand again")
    check_text(text)
    if "\0" in text:
        raise ValueError("a path has no null character")
    return Path(text)


def check_text(text: str) -> None:
    """Raises ValueError for text that holds bytes that are not UTF-8 (as a shell may pass them on)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8 text from character {error.start + 1} on; rename it") from None
