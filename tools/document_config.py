"""Writes docs/configuration.md from the schema: every key with its type, default and description.

python tools/document_config.py          # writes the page
python tools/document_config.py --check  # status 1 if the page is not up to date
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.config.describe import Group, Key, groups
from megatron_coreward.config.names import RENAMED_KEYS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration
<!-- made by tools/document_config.py from the docstrings of megatron_coreward/config/; do not edit -->

A recipe is a YAML file that names only what differs from the defaults below, which are the paper's settings where the
paper has one. On the command line any key can be overridden: `megatron-coreward train recipe.yaml actor.lr=1e-5`. The
resolved configuration of a run, with every default and every `auto` replaced by what it meant, is `config.yaml` in its
run directory.

The same text is at hand in a terminal, and in an editor that reads JSON schemas:

```
megatron-coreward config kl                              # keys whose name or description has the word
megatron-coreward config guard. --recipe recipe.yaml     # ... with their values under a recipe
megatron-coreward config --json-schema > recipe.schema.json
```

## How values are read
- Recipes, cluster files and overrides follow the core schema of YAML 1.2: only `true` and `false` are booleans, only
  `null` and `~` are null, and `off`, `1:30` and `12:00:00` are text. A key that wants text gets what was written:
  `run_dir: 010` is the directory `010`. A key that stands twice in a group is an error.
- An override's value is one such scalar up to its end (`run_dir=a #2` is the directory `a #2`), or, if it begins with
  `[`, `{` or a quote, a list, a mapping or a quoted text: `data.val_files=[a.parquet, b.parquet]`.
- In paths, a leading `~` and `$NAME` or `${NAME}` are replaced once, on the machine where the command is started. A
  variable that is not set is an error.
- `base: FILE` or `base: [FILE, ...]` at the top of a recipe takes over the keys of other files, by paths from the
  recipe's own folder; groups are merged, and a later file's value wins over an earlier one's.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for group in groups():
        title = f"`{group.name}`" if group.name else "The run"
        parts += [f"## {title}\n\n{group.description}\n\n{_table(group)}"]
    return "\n".join([*parts, _renamed()])


def _table(group: Group) -> str:
    rows = ["| key | type | default | description |", "|---|---|---|---|", *map(_row, group.keys)]
    return "\n".join(rows) + "\n"


def _row(key: Key) -> str:
    default = key.default if key.default == "required" else f"`{key.default}`"
    cells = [f"`{key.name}`", key.kind, default, key.description]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _renamed() -> str:
    head = ["## Renamed keys\n\nThe old names are refused with the new one.\n", "| old | new |", "|---|---|"]
    return "\n".join([*head, *(f"| `{old}` | `{new}` |" for old, new in RENAMED_KEYS.items()), ""])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
