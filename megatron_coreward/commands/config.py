"""`config [KEY ...]`: what the keys of a recipe are, their defaults, and their values under a recipe."""

import argparse
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coreward.errors import InputError

if TYPE_CHECKING:
    from megatron_coreward.config.describe import Group, Key
    from megatron_coreward.config.schema import RunConfig


def add(commands: Any) -> None:
    config = commands.add_parser(
        "config",
        help="explain the keys of a recipe: type, default, limits and value",
        example="megatron-coreward config actor.lr rollout --recipe configs/math_co_rewarding_i.yaml",
    )
    config.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY",
        help="a key, a group such as actor, or a word of a name or description; with --recipe also key=value",
    )
    config.add_argument("--recipe", type=Path, metavar="FILE", help="also show the values that a recipe resolves to")
    config.add_argument("--json-schema", action="store_true", help="print a JSON schema of recipes, for editors")
    config.set_defaults(run=_config)


def _config(options: argparse.Namespace) -> None:
    try:
        print(_answer(options), flush=True)
    except BrokenPipeError:  # whoever reads it has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(options: argparse.Namespace) -> str:
    from megatron_coreward.config.describe import find_keys
    from megatron_coreward.config.json_schema import json_schema
    from megatron_coreward.config.load import load_config

    overrides = [word for word in options.overrides if "=" in word]
    words = [word for word in options.overrides if "=" not in word]
    if options.json_schema:
        if options.overrides or options.recipe:
            raise InputError("--json-schema: describes all keys; give no KEY and no --recipe")
        return json.dumps(json_schema(), indent=1, ensure_ascii=False)
    if overrides and options.recipe is None:
        raise InputError(f"{overrides[0]}: key=value changes a recipe; name one with --recipe")
    recipe = None if options.recipe is None else load_config(options.recipe, overrides)
    found = find_keys(words)
    if words:
        width = min(shutil.get_terminal_size().columns, 120)
        return "\n\n".join(_whole(key, recipe, options.recipe, width) for group in found for key in group.keys)
    parts = [_overview(group, recipe) for group in found]
    return "\n\n".join([*parts, "`megatron-coreward config KEY` explains a key, a group or what a word is found in"])


def _whole(key: "Key", recipe: "RunConfig | None", path: Path | None, width: int) -> str:
    lines = [key.name, f"  {key.kind}", f"  default: {key.default}"]
    if recipe is not None:
        lines.append(f"  under {path}: {_value(key, recipe)}")
    about = textwrap.wrap(key.description, width, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*lines, *about])


def _overview(group: "Group", recipe: "RunConfig | None") -> str:
    """A line a key, with what the recipe changes."""
    lines = [group.description]
    for key in group.keys:
        value = key.default if recipe is None else _value(key, recipe)
        changed = f"  (default: {key.default})" if value != key.default and key.default != "required" else ""
        lines.append(f"  {key.name} = {value}{changed}" if value != "required" else f"  {key.name}, required")
    return "\n".join(lines)


def _value(key: "Key", recipe: "RunConfig") -> str:
    from megatron_coreward.config.describe import as_yaml

    value: Any = recipe
    for part in key.name.split("."):
        value = getattr(value, part)
    return as_yaml(value)
