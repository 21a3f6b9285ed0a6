"""Recipes load, overrides apply, and what is written back means the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_coreward.config.load import dump_config, load_config, parse_config
from megatron_coreward.config.methods import (
    BUILT_IN_NEEDS,
    REPHRASED_METHODS,
    TEACHER_METHODS,
    TWO_VIEW_METHODS,
)
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.methods import METHODS


def tree() -> dict[str, Any]:
    return {
        "run_dir": "run",
        "steps": 10,
        "method": "co_rewarding_i",
        "model": {"hf_path": "model"},
        "data": {"train_files": ["a.parquet"], "rephrased_files": ["b.parquet"]},
    }


def test_a_sparse_recipe_has_the_papers_settings() -> None:
    config = parse_config(tree())
    assert (config.data.batch_size, config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (
        128,
        512,
        3072,
    )
    assert (config.actor.lr, config.actor.lr_schedule, config.actor.lr_warmup) == (3e-6, "cosine", 0.1)
    assert (config.actor.adam_beta1, config.actor.adam_beta2, config.actor.adam_eps) == (0.9, 0.999, 1e-8)
    assert (config.rollout.n, config.teacher.n, config.rollout.temperature) == (8, 8, 1.0)
    assert (config.teacher.decay_start, config.teacher.decay_end) == (0.99, 0.9999)
    assert (config.loss.kl_estimator, config.loss.clip_low) == ("k3", 0.2)


@pytest.mark.parametrize(
    ("method", "coefficient", "reference"),
    [("co_rewarding_i", 0.005, "frozen"), ("co_rewarding_ii", 0.001, "teacher"), ("majority_voting", 0.005, "frozen")],
)
def test_null_and_auto_become_what_they_mean(method: str, coefficient: float, reference: str) -> None:
    loss = parse_config(tree() | {"method": method}).loss
    assert (loss.kl_coef, loss.kl_reference) == (coefficient, reference)


def test_a_frozen_anchor_beside_the_teacher_can_be_asked_for() -> None:
    config = parse_config(tree() | {"method": "co_rewarding_ii"}, ["loss.kl_reference=frozen", "loss.kl_coef=0"])
    assert (config.loss.kl_reference, config.loss.kl_coef) == ("frozen", 0.0)


def test_overrides_are_yaml_and_win() -> None:
    config = parse_config(tree(), ["actor.lr=1e-5", "steps=3", "data.system_prompt=null", "data.val_files=[v.parquet]"])
    assert (config.actor.lr, config.steps, config.data.system_prompt) == (1e-5, 3, None)
    assert config.data.val_files == (Path("v.parquet"),)


def test_what_is_dumped_loads_to_the_same_config(tmp_path: Path) -> None:
    config = parse_config(tree(), ["loss.dual_clip=3", "actor.lr=1.5e-6"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("actor.learning_rate=1", r"unknown key 'actor.learning_rate'; did you mean|allowed"),
        ("actor.lrr=1", "unknown key 'actor.lrr'; did you mean 'actor.lr'"),
        ("stepz=1", "unknown key 'stepz'; did you mean 'steps'"),
        ("steps=0", "steps: input should be greater than or equal to 1, found 0"),
        ("steps=many", "steps: .*found 'many'"),
        ("method=co_rewarding_iii", "method: .*'co_rewarding_i'.*found 'co_rewarding_iii'"),
        ("rollout.n=1", "rollout.n: .*greater than or equal to 2, found 1"),
        ("rollout.temperature=0", "rollout.temperature: .*greater than 0"),
        ("actor.lr=-1", "actor.lr: .*greater than 0"),
        ("teacher.decay_end=1.5", "teacher.decay_end: .*less than or equal to 1"),
        ("loss.aggregation=mean", "loss.aggregation: .*'token-mean'"),
        ("loss.kl_estimator=k4", "loss.kl_estimator: .*'k1', 'k2' or 'k3'"),
        ("model.dtype=float16", "model.dtype: .*'float32' or 'bfloat16'"),
        ("model.hf_path=null", "model.hf_path: .*found null"),
        ("data.train_files=[]", "data.train_files: .*at least 1"),
        ("actor=3", "actor: .*found 3"),
        ("rewards.equivalence=fuzzy", "rewards.equivalence: .*'exact' or 'math'"),
        ("steps.x=1", "override 'steps.x=1': steps is a value"),
        ("steps", "override 'steps': expected key=value"),
        ("steps=[", r"override 'steps=\[': not valid YAML, line 1, column 2"),
    ],
)
def test_bad_values_are_named(change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(tree(), [change])


def test_a_missing_key_is_named() -> None:
    incomplete = tree()
    del incomplete["model"]
    with pytest.raises(InputError, match="recipe.yaml: key 'model' is missing"):
        parse_config(incomplete, where="recipe.yaml")


@pytest.mark.parametrize(("text", "message"), [("- 1\n", "expected keys and values"), ("a: [", "not valid YAML")])
def test_files_that_are_no_recipes_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"bad.yaml: {message}"):
        load_config(path)
    with pytest.raises(InputError, match="does not exist"):
        load_config(tmp_path / "none.yaml")


def test_the_configs_tables_agree_with_the_methods() -> None:
    assert {name: method.needs for name, method in METHODS.items()} == BUILT_IN_NEEDS
    assert {"co_rewarding_ii", "co_rewarding_i+ii", "co_rewarding_i+ii_original"} == TEACHER_METHODS
    assert {"co_rewarding_i", "co_rewarding_i+ii", "self_harmony"} == TWO_VIEW_METHODS
    assert TWO_VIEW_METHODS | {"co_rewarding_i+ii_original"} == REPHRASED_METHODS


def test_every_recipe_of_the_repository_loads() -> None:
    configs = Path(__file__).parents[2] / "configs"
    recipes = sorted(set(configs.glob("**/*.yaml")) - set(configs.glob("parts/**/*.yaml")))
    assert recipes
    for recipe in recipes:
        assert yaml.safe_load(dump_config(load_config(recipe)))["method"] in METHODS


def test_a_mixture_is_one_value_that_a_recipe_or_an_override_replaces(tmp_path: Path) -> None:
    mixed = {"co_rewarding_i": 1, "random_reward": 0.25}
    base = write(tmp_path / "base.yaml", {**tree(), "method": mixed})
    assert load_config(base).method == {"co_rewarding_i": 1.0, "random_reward": 0.25}
    other = write(tmp_path / "other.yaml", {"base": "base.yaml", "method": {"empo": 2}})
    assert load_config(other).method == {"empo": 2.0}
    assert load_config(other, ["method=majority_voting"]).method == "majority_voting"
    config = load_config(other, ["method={empo: 1, co_rewarding_ii: -0.5}"])
    assert list(config.method.items()) == [("empo", 1.0), ("co_rewarding_ii", -0.5)]  # type: ignore[union-attr]
    assert load_config(write(tmp_path / "dumped.yaml", yaml.safe_load(dump_config(config)))) == config


def test_a_mixture_has_the_needs_of_its_parts() -> None:
    loss = parse_config(tree() | {"method": {"majority_voting": 1, "co_rewarding_ii": 1}}).loss
    assert (loss.kl_coef, loss.kl_reference) == (0.001, "teacher")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "method: expected one of"),
        ({"empoo": 1}, "method: expected one of"),
        ({"empo": 0}, "method: the weight of empo must be a finite number other than 0, not 0"),
        ({"empo": True}, "method: the weight of empo"),
        ({"empo": "much"}, "method: the weight of empo"),
        ({"empo": float("nan")}, "method: the weight of empo"),
        (["empo"], "method: expected one of"),
        (3, "method: expected one of"),
        ("a b:C", "method: expected one of"),
    ],
    ids=str,
)
def test_what_is_no_method_is_refused_with_what_is_allowed(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_config(tree() | {"method": value})
    assert str(error.value).count("config: ") == 1


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_recipe_has_the_keys_of_its_bases_later_ones_and_its_own_last(tmp_path: Path) -> None:
    write(tmp_path / "parts/all.yaml", {**tree(), "actor": {"lr": 1.0, "tensor_parallel": 2, "clip_grad": 5.0}})
    write(tmp_path / "parts/model.yaml", {"base": "all.yaml", "model": {"hf_path": "other"}, "actor": {"lr": 2.0}})
    write(tmp_path / "layout.yaml", {"actor": {"tensor_parallel": 4}, "data": {"train_files": ["c.parquet"]}})
    recipe = write(
        tmp_path / "recipe.yaml", {"base": ["parts/model.yaml", "layout.yaml"], "steps": 3, "actor": {"clip_grad": 0.0}}
    )
    config = load_config(recipe, ["actor.pipeline_parallel=2"])
    assert (config.model.hf_path, config.steps) == (Path("other"), 3)
    assert (config.actor.lr, config.actor.tensor_parallel, config.actor.clip_grad) == (2.0, 4, 0.0)
    assert config.actor.pipeline_parallel == 2
    assert config.data.train_files == (Path("c.parquet"),)  # a list is replaced
    assert config.data.rephrased_files == (Path("b.parquet"),)  # a group is merged


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("none.yaml", "recipe.yaml: base file .*none.yaml does not exist"),
        ("recipe.yaml", "is its own base"),
        ("around.yaml", "is its own base .*recipe.yaml -> .*around.yaml -> .*recipe.yaml"),
        ({"a": 1}, "base: expected a file or a list of files"),
        ([1], "base: expected a file or a list of files"),
    ],
)
def test_bases_that_cannot_be_are_named(tmp_path: Path, base: Any, message: str) -> None:
    write(tmp_path / "around.yaml", {"base": "recipe.yaml"})
    recipe = write(tmp_path / "recipe.yaml", {**tree(), "base": base})
    with pytest.raises(InputError, match=message):
        load_config(recipe)
