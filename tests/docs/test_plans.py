"""The plans of the large recipes, and those that the page on planning prints, are those that the planner makes now."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_coreward import cli
from tests.docs.pages import DOCS, ROOT, blocks, commands

RECIPES = sorted((ROOT / "configs" / "large").glob("*.yaml"))
ROWS = re.findall(r"^\| `(\w+x\d+)` \| (.+) \|$", (DOCS / "planning.md").read_text(), flags=re.MULTILINE)


def test_the_page_of_plans_has_every_large_recipe_once() -> None:
    assert [name for name, _ in ROWS] == [recipe.stem for recipe in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_page_has_the_plan_of_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe), "--json"]) == 0
    assert dict(ROWS)[recipe.stem] == row(capsys.readouterr().out)


PAGE = DOCS / "how_to" / "plan_a_layout.md"
PRINTED = [
    (command.words, after.text)
    for block, after in pairwise(blocks(PAGE))
    for command in commands(PAGE)
    if (block.language, after.language, command.line) == ("bash", "", block.line)
]


def test_the_page_on_planning_prints_plans() -> None:
    assert len(PRINTED) == 3


@pytest.mark.parametrize(("words", "text"), PRINTED, ids=[" ".join(words[2:]) for words, _ in PRINTED])
def test_the_page_on_planning_prints_what_the_command_prints(
    words: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the last line, character by character, except for what `...` leaves out of a line."""
    monkeypatch.chdir(ROOT)
    assert cli.main(words) == (2 if "error: " in text else 0)
    printed = "".join(capsys.readouterr()).splitlines()
    lines = text.splitlines()
    assert len(printed) >= len(lines)
    for shown, line in zip(lines, printed[-len(lines) :], strict=True):
        assert re.fullmatch(re.escape(shown).replace(re.escape("..."), ".*"), line), f"{line!r} is printed"
    assert len(printed) == len(lines) or "error: " in text  # a plan that does not fit is shown from its end on


def row(plan: str) -> str:
    """The cells behind a recipe's name, of what `plan --json` prints."""
    found = json.loads(plan)
    layout = found["layout"]

    def key(name: str) -> int | None:
        value: int | None = layout[name]
        return value

    ends = [str(n) for n in (key("actor.first_stage_layers"), key("actor.last_stage_layers")) if n is not None]
    pipeline = str(key("actor.pipeline_parallel"))
    if (chunks := key("actor.virtual_pipeline")) != 1:
        pipeline += f" x {chunks}"
    if ends:
        pipeline += f" ({', '.join(ends)})"
    expert = key("actor.expert_parallel")
    expert_tensor = key("actor.expert_tensor_parallel") or key("actor.tensor_parallel")  # null: as the rest of a layer
    cells = [
        key("actor.tensor_parallel"),
        pipeline,
        key("actor.data_parallel"),
        f"{expert} x {expert_tensor}" if expert != 1 else "",
        layout["actor.recompute"],
        f"{key('actor.tokens_per_microbatch'):,}",
        f"{key('rollout.num_engines')} x {key('rollout.tensor_parallel')}",
        round(found["step"]["seconds"]),
        round(max(stage["peak"] for stage in found["stages"]) / 2**30),
    ]
    return " | ".join(map(str, cells))
