"""The pages of the project, and what stands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = tuple(sorted(DOCS.rglob("*.md")))
ALL_PAGES = (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")), *PAGES)

FORMER = ("CHANGELOG.md", "migration.md")  # pages that name what was

_FENCE = re.compile(r"\s*```(\S*)")
_COMMAND = re.compile(r"(?:^|\s)(?:\.venv/bin/)?megatron-coreward\s(?=[a-z-])")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str  # relative to the repository
    line: int  # of its first line, from 1
    language: str  # what stands behind the fence; empty if nothing does
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A call of the command line in a page."""

    page: str
    line: int  # of the block that it stands in
    words: tuple[str, ...]  # behind `megatron-coreward`

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page outside of its fenced blocks, with their numbers."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    name, begin, language, lines = str(page.relative_to(ROOT)), 0, "", list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and not begin:
            begin, language, lines = number + 1, fence[1], []
        elif fence:
            yield Block(name, begin, language, "\n".join(lines))
            begin = 0
        elif begin:
            lines.append(line)
    assert not begin, f"{name}: the block of line {begin} has no end"


def commands(page: Path) -> Iterator[Command]:
    """Every call of `megatron-coreward` in the blocks of shell commands of a page."""
    for block in blocks(page):
        if block.language not in ("", "bash", "sh", "console"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            for piece in _COMMAND.split(line)[1:]:
                lexer = shlex.shlex(piece, posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                words = []
                for word in lexer:
                    if set(word) <= set("();<>|&"):  # the end of this command
                        break
                    words.append(word)
                yield Command(block.page, block.line, tuple(words))
