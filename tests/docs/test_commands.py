"""Every command of the pages is one that the command line takes, on keys and files that there are.

What a command does is shown by the test that `RUN_BY` names and by this file (`RUN_HERE`), or not at all on machines
that the project is tested on (`NOT_RUN_HERE`, each with its reason).
"""

import argparse
import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_coreward import cli
from megatron_coreward.config.describe import all_keys, find_keys
from megatron_coreward.config.load import load_config
from tests.docs.pages import ALL_PAGES, PAGES, ROOT, Command, blocks, commands

COMMANDS = [command for page in ALL_PAGES for command in commands(page)]

RUN_HERE = ("plan", "config")  # on recipes that are shipped; in a moment, with no process
RUN_BY = {
    "demo": "tests/demo/test_demo_run.py",
    "prepare-data": "tests/data/test_prepare.py",
    "rephrase": "tests/evaluation/test_rephrase.py",
    "plan": "tests/planner/test_recipes.py",
    "config": "tests/commands/test_config.py",
    "train": "tests/e2e/test_train.py",
    "launch local": "tests/launch/test_local.py",
    "launch slurm": "tests/launch/test_slurm.py",
    "evaluate run": "tests/evaluation/test_evaluate.py",
    "evaluate compare": "tests/evaluation/test_evaluate.py",
    "evaluate lm-eval": "tests/evaluation/test_lm_eval.py",
    "evaluate paper": "tests/e2e/test_reproduce.py",
    "evaluate table": "tests/e2e/test_reproduce.py",
    "report": "tests/report/test_replay.py",
    "compare": "tests/report/test_replay.py",
    "replay": "tests/report/test_replay.py",
    "verify-sync": "tests/e2e/test_transports.py",
    "convert to-megatron": "tests/checkpoint/test_convert.py",
    "convert to-hf": "tests/checkpoint/test_convert.py",
    "convert verify": "tests/checkpoint/test_verify.py",
}
NOT_RUN_HERE = {
    "launch kubernetes": "it needs a cluster with KubeRay; its manifests are tested (tests/launch/test_previews.py)",
    "launch skypilot": "it needs an account of a cloud; the task is tested (tests/launch/test_previews.py)",
}


def parsed(command: Command) -> argparse.Namespace:
    """The options of a command, with all of its key=value in `overrides`."""
    options, more = cli._parser().parse_known_args(command.words)
    if more:
        assert hasattr(options, "overrides"), f"{command}: nobody takes {more}"
        assert not [word for word in more if word.startswith("-")], f"{command}: nobody takes {more}"
        options.overrides += more
    return options


def name_of(words: Sequence[str]) -> str:
    depth = 2 if words[0] in ("launch", "evaluate", "convert") else 1
    return " ".join(words[:depth])


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 60
    assert {name_of(command.words) for command in COMMANDS if command.words[0] != "--help"} <= {*RUN_BY, *NOT_RUN_HERE}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_the_command_line_takes_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--help" in command.words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(command.words)
        return
    monkeypatch.chdir(ROOT)
    options = parsed(command)
    keys = [word.partition("=")[0] for word in getattr(options, "overrides", []) if "=" in word]
    assert [key for key in keys if key not in all_keys()] == []
    cluster = getattr(options, "cluster", None)
    if cluster is not None and cluster.parent == Path("launch/clusters"):
        assert cluster.is_file()
    recipe = getattr(options, "config", None)
    if recipe is not None and recipe.parts[0] == "configs" and "$" not in str(recipe):
        load_config(recipe, options.overrides)  # values of keys, too
    if options.command == "config" and options.recipe is None:
        find_keys([word for word in options.overrides if word != "WORD" and word != "KEY"])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] in RUN_HERE], ids=str)
def test_commands_on_shipped_recipes_do_what_the_pages_say(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in command.words if word not in ("KEY", "WORD")]
    if any(word in ("RECIPE", "recipe.yaml", "CONFIG") for word in words):
        words = [
            "configs/math_co_rewarding_i.yaml" if "recipe" in word.lower() and word[0] != "-" else word
            for word in words
        ]
    if "--help" in words:
        return
    monkeypatch.chdir(ROOT)
    status = cli.main(words)
    said = capsys.readouterr()
    assert (status, said.err) == (0, "") or (status == 2 and "does not fit" in said.err), said.err


def test_what_runs_a_command_is_there() -> None:
    assert [path for path in RUN_BY.values() if not (ROOT / path).is_file()] == []
    for name, path in RUN_BY.items():
        word = name.split()[-1].replace("-", "_")
        text = (ROOT / path).read_text()
        assert word in text or name.split()[-1] in text, f"{path} says nothing of {name}"


@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks(page) if block.language == "python"],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_python_in_pages_compiles_and_imports_what_there_is(block) -> None:  # type: ignore[no-untyped-def]
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
