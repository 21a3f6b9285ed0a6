"""The messages of the page on troubleshooting are those of the code."""

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import DOCS, ROOT

MESSAGES = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)


@cache
def texts() -> str:
    """Every string of the package, and what argparse says of options that nobody takes."""
    found = ["unrecognized arguments: "]
    for path in sorted((ROOT / "megatron_coreward").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split(" ")) for text in found)


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_code(message: str) -> None:
    """Piece by piece: what stands between two `…` stands so in one string."""
    pieces = [piece.strip(" ") for piece in message.split("…")]
    said = [piece for piece in pieces if len(piece) > 3]
    assert said, "nothing of the message stays the same"
    assert [piece for piece in said if piece not in texts()] == []
