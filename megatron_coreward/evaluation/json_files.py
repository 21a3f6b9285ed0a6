"""The JSON files that evaluations leave: written whole or not at all, and checked when they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import replaced_whole

T = TypeVar("T")


def write_json(path: Path, content: object) -> None:
    """Writes a JSON file, whole or not at all."""
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path, name: str, what: str, number: int, build: Callable[[dict[str, Any]], T]) -> T:
    """Builds an object from a file, or from the file `name` of a folder.

    Args:
        what: what the file holds, for messages, such as `result of an evaluation`.
        number: the value that the file's key `format` must have.
        build: takes the file's content, and raises KeyError, TypeError or ValueError if that has another form.

    Raises InputError if the file is missing or of another form.
    """
    file = path / name if path.is_dir() else path
    try:
        content = json.loads(file.read_text())
        if content["format"] == number:
            return build(content)
    except OSError as error:
        raise InputError(f"{file}: no {what} there ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a {what} ({error!r})") from None
    raise InputError(f"{file}: found format {content['format']}; allowed: {number}")
