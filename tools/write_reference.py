"""Writes the reference pages from the code: docs/configuration.md, docs/command_line.md, docs/metrics.md.

python tools/write_reference.py          # writes the pages
python tools/write_reference.py --check  # status 1, and the names, if pages are not up to date
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward import cli
from megatron_coreward.config.describe import Key, groups
from megatron_coreward.config.names import RENAMED_KEYS
from megatron_coreward.telemetry import keys

DOCS = Path(__file__).parents[1] / "docs"

CONFIGURATION = """# Configuration
<!-- made by tools/write_reference.py from the docstrings of megatron_coreward/config/; do not edit -->

A recipe is a YAML file that names only what differs from the defaults below, which are the paper's settings where the
paper has one. On the command line any key can be overridden: `megatron-coreward train recipe.yaml actor.lr=1e-5`. The
resolved configuration of a run, with every default and the value that each `auto` stood for, is `config.yaml` in its
run directory.

The same text is shown in a terminal, and in an editor that reads JSON schemas:

```
megatron-coreward config kl                              # keys whose name or description has the word
megatron-coreward config guard. --recipe recipe.yaml     # ... with their values under a recipe
megatron-coreward config --json-schema > recipe.schema.json
```

## How values are read
- Recipes, cluster files and overrides follow the core schema of YAML 1.2: only `true` and `false` are booleans, only
  `null` and `~` are null, and `off`, `1:30` and `12:00:00` are text. A key whose type is text gets what was written:
  `run_dir: 010` is the directory `010`. A key that occurs twice in a group is an error.
- An override's value is one such scalar up to its end (`run_dir=a #2` is the directory `a #2`), or, if it begins with
  `[`, `{` or a quote, a list, a mapping or a quoted text: `data.val_files=[a.parquet, b.parquet]`.
- In paths, a leading `~` and `$NAME` or `${NAME}` are replaced once, on the machine where the command is started. A
  variable that is not set is an error.
- `base: FILE` or `base: [FILE, ...]` at the top of a recipe takes over the keys of other files, by paths from the
  recipe's own folder; groups are merged, and a later file's value wins over an earlier one's.
"""

COMMAND_LINE = """# Command line
<!-- made by tools/write_reference.py from the parsers of megatron_coreward/commands/; do not edit -->

Every command is `megatron-coreward COMMAND ...`, also as `python -m megatron_coreward COMMAND ...`. What it takes is
shown by `megatron-coreward COMMAND --help`, from which this page is made. Options are written out in full, and
`key=value` arguments may come before, between and after them; the keys are those of
[Configuration](configuration.md).

| exit status | what it says |
|---|---|
| 0 | The command did its work. A training that was asked to stop has saved, and says how to go on. |
| 1 | The run, or the command, failed. The last line says why, and from where the same command goes on. |
| 2 | The input is bad: one message names the key, file or option, what was found, and what is allowed. |
| 3 | The run was halted by its own collapse guard ([Tune the collapse guard](how_to/tune_the_guard.md)). |
"""

METRICS = """# Metrics
<!-- made by tools/write_reference.py from megatron_coreward/telemetry/keys.py; do not edit -->

A run writes one JSON object a step into `metrics.jsonl`, and the same numbers to TensorBoard and to any tracker that is
configured. A metric that a method or a step does not have is left out of the row; it is never written as zero. Times
are in seconds, entropies, KL terms and log-probability gaps are in nats, and shares and rates are between 0 and 1.
"""


def configuration() -> str:
    """Every key with its type, default and description."""
    parts = [CONFIGURATION]
    for group in groups():
        title = f"`{group.name}`" if group.name else "The run"
        rows = ["| key | type | default | description |", "|---|---|---|---|", *map(_key_row, group.keys)]
        parts += [f"## {title}\n\n{group.description}\n\n" + "\n".join(rows) + "\n"]
    renamed = [f"| `{old}` | `{new}` |" for old, new in RENAMED_KEYS.items()]
    head = ["## Renamed keys\n\nThe old names are refused with the new one.\n", "| old | new |", "|---|---|"]
    return "\n".join([*parts, *head, *renamed, ""])


def _key_row(key: Key) -> str:
    default = key.default if key.default == "required" else f"`{key.default}`"
    return _row(f"`{key.name}`", key.kind, default, key.description)


def command_line() -> str:
    """Every command with its arguments, options, defaults and examples."""
    return "\n".join([COMMAND_LINE, *_commands(cli.make_parser(), "")])


def _commands(parser: argparse.ArgumentParser, about: str) -> Iterator[str]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    words = parser.prog.partition(" ")[2]
    if words:
        yield f"## {words}\n" if " " not in words else f"### {words}\n"
        yield f"{_sentence(about)}\n"
    arguments = [action for action in parser._actions if _is_shown(action)]
    if words and arguments:
        yield "\n".join(["| argument | what it is |", "|---|---|", *(_argument(parser, a) for a in arguments), ""])
    if words and (example := getattr(parser, "example", None)):
        yield f"```bash\n{example}\n```\n"
    for action in inner:
        texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, command in action.choices.items():
            if name in texts:  # a former command, which only says its new name, has none
                yield from _commands(command, texts[name])


def _is_shown(action: argparse.Action) -> bool:
    hidden = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    return not hidden and action.help != argparse.SUPPRESS


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    metavar = formatter._metavar_formatter(action, action.dest.upper() if action.option_strings else action.dest)(1)[0]
    shown = ", ".join(action.option_strings)
    if action.nargs != 0:
        value = formatter._format_args(action, action.dest.upper()) if action.choices is None else metavar
        shown = f"{shown} {value}".strip()
    required = " (required)" if action.required and action.option_strings else ""
    return _row(f"`{shown}`", f"{formatter._expand_help(action) if action.help else ''}{required}")


def metrics() -> str:
    """Every metric with its meaning, by area."""
    areas: dict[str, list[str]] = {}
    for key, meaning in keys.MEANINGS.items():
        area = key.partition("/")[0] if "/" in key else ""
        areas.setdefault(area, []).append(_row(f"`{key}`", meaning))
    validation = [_row(f"`{key}k`", meaning) for key, meaning in keys.VALIDATION_MEANINGS.items()]
    parts = [METRICS]
    for area, rows in areas.items():
        parts.append("\n".join([f"## {f'`{area}/`' if area else 'Always there'}\n", *_HEAD, *rows, ""]))
    parts.append("\n".join(["## `val/`\n", *_HEAD, *validation, ""]))
    parts.append(
        "Validation over several data sets also has each of these for every set, with the set's source in\n"
        "between: `val/openai/gsm8k/avg@8`.\n"
    )
    return "\n".join(parts)


_HEAD = ("| metric | what it is |", "|---|---|")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


PAGES = {"configuration.md": configuration, "command_line.md": command_line, "metrics.md": metrics}


if __name__ == "__main__":
    made = {DOCS / name: page() for name, page in PAGES.items()}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(", ".join(f"{path.name} is not up to date" for path in stale) or 0)
    for path in stale:
        path.write_text(made[path])
