"""Links lead somewhere, every page is in the site, and lists and tables of GitHub are lists and tables in the site."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ALL_PAGES, DOCS, FORMER, PAGES, ROOT, prose

LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"`[^`]*`")
# A file of the repository, by its whole path, as code in a page.
PATH = re.compile(r"`((?:tests|benchmarks|tools|configs|docker|launch|megatron_coreward|requirements)/[\w./-]+\.\w+)")


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page's headings, as the site makes them."""
    found: set[str] = set()
    for _, line in prose(page):
        if heading := re.match(r"#{1,6}\s+(.*)", line):
            words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading[1])).strip().lower()
            slug = re.sub(r"[-\s]+", "-", words)
            number = 1
            while slug in found:
                slug = f"{slug}_{number}"
                number += 1
            found.add(slug)
    return frozenset(found)


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for number, line in prose(page):
        for target in LINK.findall(CODE.sub("", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = page if not path else (page.parent / path).resolve()
            if not file.exists():
                broken.append(f"line {number}: {target}: no such file")
            elif anchor and anchor not in anchors(file):
                broken.append(f"line {number}: {target}: no such heading")
            elif page in PAGES and file != page and DOCS not in file.parents:
                broken.append(f"line {number}: {target}: not in the site")
    assert broken == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_by_their_path_exist(page: Path) -> None:
    if page.name in FORMER:
        return
    named = {path for _, line in prose(page) for path in PATH.findall(line)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def in_nav(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in in_nav(value)]


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(in_nav(site["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)
    assert site["strict"] is True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_begin_after_an_empty_line_or_a_heading(page: Path) -> None:
    """Else the site shows them as text; GitHub does not mind."""
    wrong, before = [], ""
    for number, line in prose(page):
        item = re.match(r"(?:[-*]|\d+\.) ", line)
        goes_on = re.match(r"\s*(?:[-*]|\d+\.) |#|\s*$|\s{2}", before)
        if (item and not goes_on) or (line.startswith("|") and not re.match(r"\||#|\s*$", before)):
            wrong.append(f"line {number}: {line}")
        before = line
    assert wrong == []


def test_every_picture_of_the_docs_is_shown_somewhere() -> None:
    shown = {
        (page.parent / target).resolve()
        for page in ALL_PAGES
        for _, line in prose(page)
        for target in re.findall(r"!\[[^\]]+\]\(([^()\s]+)\)", line)
    }
    pictures = {path.resolve() for path in DOCS.rglob("*") if path.suffix in (".png", ".svg")}
    assert pictures - shown == set()
