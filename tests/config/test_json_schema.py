"""Editors mark in a recipe what loading it would refuse, and nothing in those of the repository."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megatron_coreward.config import plugins
from megatron_coreward.config.describe import all_keys
from megatron_coreward.config.json_schema import json_schema
from megatron_coreward.config.yaml_file import plain, read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_it_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_and_every_part_is_valid(recipe: Path) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(plain(read_yaml(recipe, "recipe")))] == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"actor": {"lrr": 1}},
        {"rolout": {}},
        {"actor": {"lr": 0}},
        {"seed": 2**32},
        {"method": "co_rewarding_iii"},
        {"method": {"co_rewarding_iii": 1}},
        {"method": {"empo": "much"}},
        {"method": {}},
        {"guard": {"action": "of"}},
        {"data": {"train_files": []}},
        {"base": 3},
    ],
    ids=str,
)
def test_what_loading_would_refuse_is_marked(recipe: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(recipe)


@pytest.mark.parametrize(
    "method", ["empo", "my_package.my_module:MyMethod", {"co_rewarding_i": 1, "my_module:MyMethod": -0.1}], ids=str
)
def test_every_form_of_a_method_is_valid(method: Any) -> None:
    assert VALIDATOR.is_valid({"method": method})


def test_the_names_of_installed_methods_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("installed_one", "my_module:MyMethod", plugins.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    found = jsonschema.Draft202012Validator(json_schema())
    assert found.is_valid({"method": "installed_one"})
    assert found.is_valid({"method": {"installed_one": 1, "empo": 2}})
    assert not VALIDATOR.is_valid({"method": "installed_one"})


def test_every_key_has_its_description_there() -> None:
    schema = json_schema()
    for key in all_keys().values():
        *group, last = key.name.split(".")
        node = schema
        for part in group:
            node = schema["$defs"][node["properties"][part]["$ref"].rpartition("/")[2]]
        assert node["properties"][last]["description"] == key.description
