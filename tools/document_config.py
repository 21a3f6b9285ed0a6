"""Writes docs/configuration.md from config/schema.py: every key with its type, default and comment.

python tools/document_config.py          # writes the page
python tools/document_config.py --check  # status 1 if the page is not up to date
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "megatron_coreward" / "config" / "schema.py"
PAGE = ROOT / "docs" / "configuration.md"

HEAD = """# Configuration
<!-- made by tools/document_config.py from config/schema.py; do not edit -->

A recipe is a YAML file that names only what differs from the defaults below, which are the paper's settings where the
paper has one. On the command line any key can be overridden: `megatron-coreward train recipe.yaml actor.lr=1e-5`. The
resolved configuration of a run, with every default and every `auto` replaced by what it meant, is `config.yaml` in its
run directory.
"""


def page() -> str:
    """The whole page."""
    source = SCHEMA.read_text()
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    parts = [HEAD, "## The run\n", *_table(classes["RunConfig"], lines, skip=classes)]
    for field in _fields(classes["RunConfig"]):
        kind = ast.unparse(field.annotation)
        if kind in classes:
            parts += [f"\n## `{_name(field)}`\n", *_table(classes[kind], lines, prefix=f"{_name(field)}.")]
    return "\n".join(parts) + "\n"


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [item for item in node.body if isinstance(item, ast.AnnAssign)]


def _name(field: ast.AnnAssign) -> str:
    assert isinstance(field.target, ast.Name)
    return field.target.id


def _table(
    node: ast.ClassDef, lines: list[str], prefix: str = "", skip: dict[str, ast.ClassDef] | None = None
) -> list[str]:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in _fields(node):
        kind = ast.unparse(field.annotation)
        if skip and kind in skip:
            continue
        default = "required" if field.value is None else _default(ast.unparse(field.value))
        _, _, comment = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")
        cells = [f"`{prefix}{_name(field)}`", _kind(kind), default, comment]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _default(text: str) -> str:
    if text.startswith("Field("):
        return "required"
    words = {"None": "null", "True": "true", "False": "false", "()": "[]", "SYSTEM_PROMPT": "the paper's"}
    return f"`{words.get(text, text.strip(chr(39)))}`"


def _kind(text: str) -> str:
    text = text.replace(" | None", " or null")
    names = {
        "Positive": "integer ≥ 1",
        "NonNegative": "integer ≥ 0",
        "Fraction": "0 to 1",
        "Path": "path",
        "tuple[Path, ...]": "list of paths",
        "bool": "true or false",
        "str": "text",
        "MethodName": "method",
    }
    for name, words in names.items():
        text = re.sub(rf"^{re.escape(name)}(?= or null|$)", words, text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "`").replace(", ", " or "), text)
    limits = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

    def bounded(match: re.Match[str]) -> str:
        pairs = (pair.split("=") for pair in match[2].split(", "))
        return f"{'number' if match[1] == 'float' else 'integer'} " + ", ".join(f"{limits[k]} {v}" for k, v in pairs)

    return re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", bounded, text)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())
