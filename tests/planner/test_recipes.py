"""Every recipe loads, is allowed, fits the GPUs that its name says, and is told in three lines."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_coreward.config.load import load_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.planner.models import CONFIGS, architecture_of
from megatron_coreward.planner.plan import Plan, make_plan
from tests.planner.settings import machine

CONFIGS_DIR = Path(__file__).parents[2] / "configs"
RECIPES = sorted((*CONFIGS_DIR.glob("paper/*.yaml"), *CONFIGS_DIR.glob("large/*.yaml")))
GPUS = {80: ("a100", "h100"), 141: ("h200",)}

# Checkpoints that the paper's authors released (github.com/resistzzz/Co-rewarding), each for both instantiations.
PAPER = {
    "math": {"Qwen2.5-3B", "Qwen2.5-7B", "Qwen3-1.7B-Base", "Qwen3-4B-Base", "Qwen3-8B-Base", "Llama-3.2-3B-Instruct"},
    "dapo": {"Qwen3-4B-Base", "Qwen3-8B-Base", "Llama-3.2-3B-Instruct"},
    "open-rs": {"Qwen3-4B-Base", "Qwen3-8B-Base"},
}
LARGE = {"Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-3.1-70B", "Qwen2.5-72B"}


@cache
def load(recipe: Path) -> RunConfig:
    return load_config(recipe)


def size(recipe: Path) -> tuple[int, int]:
    """GPUs and their gigabytes, by the name of the recipe's layout."""
    found = re.search(r"_(\d+)x(\d+)\.yaml$", yaml.safe_load(recipe.read_text())["base"][-1])
    assert found is not None
    return int(found[1]), int(found[2])


def plan(recipe: Path, gpu: str) -> Plan:
    config = load(recipe)
    return make_plan(config, architecture_of(config.model), machine(gpu))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_allowed_and_fits(recipe: Path) -> None:
    num_gpus, gigabytes = size(recipe)
    for gpu in GPUS[gigabytes]:
        planned = plan(recipe, gpu)
        assert planned.problems == ()
        assert planned.num_gpus == num_gpus
        assert 10 < planned.seconds < 1200


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_sparse_and_has_the_papers_settings(recipe: Path) -> None:
    assert set(yaml.safe_load(recipe.read_text())) == {"base", "run_dir"}
    config = load(recipe)
    assert config.run_dir == Path("runs") / recipe.stem
    assert list(setting_problems(config)) == []
    assert (config.data.batch_size, config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (
        128,
        512,
        3072,
    )
    assert (config.actor.lr, config.actor.lr_schedule, config.actor.lr_warmup) == (3e-6, "cosine", 0.1)
    assert (config.rollout.n, config.teacher.n, config.rollout.temperature) == (8, 8, 1.0)
    assert config.loss.kl_coef == (0.005 if config.method == "co_rewarding_i" else 0.001)
    assert bool(config.data.rephrased_files) == (config.method == "co_rewarding_i")


def test_every_model_method_and_data_set_of_the_paper_has_a_recipe() -> None:
    found = {(load(r).data.train_files[0].parent.name, load(r).model.hf_path.name, load(r).method) for r in RECIPES}
    methods = ("co_rewarding_i", "co_rewarding_ii")
    assert {(data, model, method) for data, models in PAPER.items() for model in models for method in methods} <= found
    assert {("math", model, method) for model in LARGE for method in methods} <= found
    assert {model for _, model, _ in found} <= set(CONFIGS)


def test_layouts_go_from_8_to_256_gpus_of_either_size() -> None:
    sizes = {size(recipe) for recipe in RECIPES}
    for gigabytes in (80, 141):
        numbers = {num_gpus for num_gpus, of in sizes if of == gigabytes}
        assert min(numbers) == 8
        assert max(numbers) == 256


def test_no_part_lies_unused() -> None:
    used: set[Path] = set()

    def supervise(path: Path) -> None:
        bases = yaml.safe_load(path.read_text()).get("base", [])
        for base in bases if isinstance(bases, list) else [bases]:
            part = (path.parent / base).resolve()
            used.add(part)
            supervise(part)

    for recipe in RECIPES:
        supervise(recipe)
    assert {part.resolve() for part in CONFIGS_DIR.glob("parts/**/*.yaml")} == used
