"""The pages that are made from the code are up to date."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward import cli
from megatron_coreward.commands.dry_run import written_files
from megatron_coreward.config.describe import Key, all_keys
from megatron_coreward.config.load import load_config
from megatron_coreward.config.names import RENAMED_KEYS
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.rollout_dump import SCHEMA

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("columns", ["50", "200"])
def test_the_pages_are_those_of_schema_parsers_and_metrics(columns: str) -> None:
    """On a terminal of any width."""
    done = subprocess.run(
        [sys.executable, "tools/write_reference.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": columns},
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run: python tools/write_reference.py ({done.stderr.strip()})"


def test_every_command_is_on_its_page() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    for command in cli.COMMANDS:
        assert f"\n## {command.__name__.rpartition('.')[2].replace('_', '-')}\n" in page


def test_every_metric_is_on_its_page() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text().replace("\\|", "|")
    assert [key for key, meaning in keys.MEANINGS.items() if f"| `{key}` | {meaning} |" not in page] == []


def test_the_page_of_a_run_directory_has_every_file_of_a_run() -> None:
    page = (ROOT / "docs" / "run_directory.md").read_text()
    recipe = load_config(ROOT / "configs" / "math_co_rewarding_i.yaml", [])
    assert [name for name in written_files(recipe, None) if f"| `{name}` | " not in page] == []


def test_the_page_of_a_run_directory_has_every_column_of_the_rollouts() -> None:
    page = (ROOT / "docs" / "run_directory.md").read_text()
    rows = "\n".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    assert [name for name in SCHEMA.names if f"`{name}`" not in rows] == []


@pytest.mark.parametrize("key", all_keys().values(), ids=lambda key: key.name)
def test_every_key_is_on_the_page_with_default_and_description(key: Key) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key.name}` | ") and key.description in line]
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert cells[1:] == [key.kind, key.default if key.default == "required" else f"`{key.default}`", key.description]


def test_every_renamed_key_is_on_the_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [old for old, new in RENAMED_KEYS.items() if f"| `{old}` | `{new}` |" not in page] == []
