"""The pages that are made from the code are up to date."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward.config.describe import Key, all_keys
from megatron_coreward.config.names import RENAMED_KEYS

ROOT = Path(__file__).parents[1]


def test_the_configuration_page_is_that_of_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "tools/document_config.py", "--check"], cwd=ROOT, timeout=60, capture_output=True
    )
    assert done.returncode == 0, "run: python tools/document_config.py"


@pytest.mark.parametrize("key", all_keys().values(), ids=lambda key: key.name)
def test_every_key_is_on_the_page_with_default_and_description(key: Key) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{key.name}` | ") and key.description in line]
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert cells[1:] == [key.kind, key.default if key.default == "required" else f"`{key.default}`", key.description]


def test_every_renamed_key_is_on_the_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [old for old, new in RENAMED_KEYS.items() if f"| `{old}` | `{new}` |" not in page] == []
