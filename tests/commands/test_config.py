"""`config` explains keys in a terminal, shows what a recipe makes of them, and writes the schema for editors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward.cli import main
from megatron_coreward.config.describe import all_keys
from megatron_coreward.config.json_schema import json_schema

RECIPE = """
run_dir: 010
steps: 3
method: co_rewarding_ii
model: {hf_path: model}
data: {train_files: [a.parquet, b c.parquet]}
actor: {lr: 1e-5}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_a_key_is_shown_with_type_default_and_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "guard.action"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("guard.action\n  `off` or `warn` or `raise_kl` or ")
    assert "  default: warn\n" in printed
    assert all_keys()["guard.action"].description in " ".join(printed.split())


def test_a_word_finds_keys_of_several_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "temperature"]) == 0
    printed = capsys.readouterr().out
    assert "\nvalidation.temperature\n" in printed
    assert printed.startswith("rollout.temperature\n")


def test_the_overview_names_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in all_keys().values():
        assert (f"  {key.name}, required" if key.default == "required" else f"  {key.name} = {key.default}") in lines


def test_a_recipes_values_are_those_it_resolves_to(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "loss.kl_coef", "actor.lr", "--recipe", recipe, "actor.lr=2e-5"]) == 0
    printed = capsys.readouterr().out
    assert f"  default: null\n  under {recipe}: 0.001\n" in printed  # the paper's value for the method
    assert f"  default: 3e-06\n  under {recipe}: 2e-05\n" in printed
    assert main(["config", "--recipe", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert '  run_dir = "010"' in lines
    assert "  actor.lr = 1e-05  (default: 3e-06)" in lines
    assert '  data.train_files = [a.parquet, "b c.parquet"]' in lines
    assert "  loss.kl_reference = teacher  (default: auto)" in lines


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["temprature"], "'temprature' in its name or description; did you mean 'temperature'?"),
        (["sync.hashes"], "key 'sync.hashes' is called 'sync.checksums' now"),
        (["actor.lr=1"], "actor.lr=1: key=value changes a recipe; name one with --recipe"),
        (["actor.lr", "--json-schema"], "--json-schema: describes all keys"),
        (["--recipe", "none.yaml"], "config file none.yaml does not exist"),
    ],
)
def test_what_it_cannot_answer_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    program = "import sys; from megatron_coreward.cli import main; sys.exit(main(['config']))"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"
