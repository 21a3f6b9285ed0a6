"""Every recipe loads, is allowed, fits the GPUs that its name says, and is summed up in three lines."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_coreward.config.load import load_config
from megatron_coreward.config.paper import CHECKPOINT_EVERY, PAPER_STEPS, PaperRun, paper_runs
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.planner.models import CONFIGS, architecture_of
from megatron_coreward.planner.plan import Plan, fixed_problems, make_plan
from megatron_coreward.planner.search import HEADROOM, search
from tests.planner.settings import machine

CONFIGS_DIR = Path(__file__).parents[2] / "configs"
RECIPES = sorted((*CONFIGS_DIR.glob("paper/*.yaml"), *CONFIGS_DIR.glob("large/*.yaml")))
PLAIN = sorted(CONFIGS_DIR.glob("*.yaml"))
GPUS = {80: ("a100", "h100"), 141: ("h200",)}

FOLDERS = {"math": "math", "dapo": "dapo", "open_rs": "open-rs"}
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
        assert max(stage.peak for stage in planned.stages) <= (1 - HEADROOM) * planned.machine.gpu.memory_bytes
        assert planned.num_gpus == num_gpus
        assert 10 < planned.seconds < 1200


@pytest.mark.parametrize("gpu", GPUS[80])
@pytest.mark.parametrize("recipe", PLAIN, ids=lambda path: path.stem)
def test_a_run_of_its_own_layout_fits_the_gpus_that_it_names(recipe: Path, gpu: str) -> None:
    config = load(recipe)
    assert config.gpu is None  # any of 80 GB
    planned = plan(recipe, gpu)
    assert planned.problems == ()
    assert max(stage.peak for stage in planned.stages) <= (1 - HEADROOM) * planned.machine.gpu.memory_bytes


@pytest.mark.parametrize("recipe", [*RECIPES, *PLAIN], ids=lambda path: path.stem)
def test_no_recipe_is_said_to_be_wrong_whatever_its_layout(recipe: Path) -> None:
    config = load(recipe)
    assert fixed_problems(config, architecture_of(config.model), machine(config.gpu or "h200")) == []


def uneven() -> list[object]:
    """A recipe of every layout whose stages have different numbers of layers."""
    of_layout: dict[str, Path] = {}
    for recipe in RECIPES:
        layout = yaml.safe_load(recipe.read_text())["base"][-1]
        if "first_stage_layers" in (recipe.parent / layout).read_text():
            of_layout.setdefault(layout, recipe)
    large = "qwen3_235b"  # a search for each takes seconds to half a minute
    return [
        pytest.param(recipe, id=recipe.stem, marks=[pytest.mark.slow] if recipe.stem.startswith(large) else [])
        for recipe in of_layout.values()
    ]


@pytest.mark.long
@pytest.mark.parametrize("recipe", uneven())
def test_a_search_finds_layouts_for_a_recipe_with_uneven_stages(recipe: Path) -> None:
    config, (num_gpus, gigabytes) = load(recipe), size(recipe)
    on = machine(GPUS[gigabytes][-1])
    arch = architecture_of(config.model)
    assert fixed_problems(config, arch, on) == []  # or the command would not search at all
    assert search(config, arch, on, num_gpus)


def test_thirteen_layouts_have_uneven_stages() -> None:
    assert len(uneven()) == 13


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
    assert config.loss.kl_coef == (0.001 if config.method == "co_rewarding_ii" else 0.005)
    assert config.loss.views == ("sum" if config.method == "co_rewarding_i" else "mean")
    assert config.rewards.equivalence == ("hendrycks" if config.method == "ground_truth" else "exact")
    assert (config.validation.equivalence, config.validation.samples) == ("hendrycks", "greedy")
    assert bool(config.data.rephrased_files) == (config.method == "co_rewarding_i")


@pytest.mark.parametrize("recipe", [*RECIPES, *PLAIN], ids=lambda path: path.stem)
def test_the_guard_of_a_recipe_sees_collapses_that_only_anchors_show(recipe: Path) -> None:
    config = load(recipe)
    assert (config.guard.action, config.guard.anchors, config.guard.min_anchors) == ("warn", 64, 0)
    strict, without = load_config(recipe, ["guard.min_anchors=48"]), load_config(recipe, ["guard.anchors=0"])
    assert strict.guard.min_anchors == 48  # without naming anchors as well
    assert config.rollout.schedule == "deterministic"  # nothing is in flight while anchors are drawn
    assert config.rollout.max_staleness == 0
    assert config.model_copy(update={"guard": without.guard}) == without  # training is as it is without them


def test_all_66_checkpoints_of_the_release_have_a_recipe_and_no_other_run_has() -> None:
    """Six models on MATH, three on DAPO-14k, two on Open-RS, with six methods each."""
    runs = list(paper_runs())
    assert len(runs) == len({run.released for run in runs}) == 66
    assert {run.recipe for run in runs} == {path.stem for path in CONFIGS_DIR.glob("paper/*.yaml")}
    for run in runs:
        config = load(CONFIGS_DIR / "paper" / f"{run.recipe}.yaml")
        assert (config.model.hf_path.name, config.method, config.steps) == (run.model, run.method, run.steps)
        assert config.data.train_files == (Path(f"data/{FOLDERS[run.data]}/train_original.parquet"),)
    assert len({load(CONFIGS_DIR / "paper" / f"{run.recipe}.yaml").run_dir for run in runs}) == 66


@pytest.mark.parametrize(
    ("run", "released"),
    [
        (PaperRun("Qwen3-1.7B-Base", "math", "co_rewarding_i"), "Co-rewarding-I-Qwen3-1.7B-Base-MATH"),
        (PaperRun("Llama-3.2-3B-Instruct", "dapo", "ground_truth"), "GT-Llama-3.2-3B-Instruct-DAPO14k"),
        (PaperRun("Qwen3-8B-Base", "open_rs", "majority_voting"), "Majority-Voting-Qwen3-8B-Base-OpenRS"),
        (PaperRun("Qwen2.5-7B", "math", "self_certainty"), "Self-Certainty-Qwen2.5-7B-MATH"),
    ],
)
def test_checkpoints_are_called_as_on_the_hub(run: PaperRun, released: str) -> None:
    assert run in paper_runs()
    assert run.released == f"TMLR-Group-HF/{released}"


def test_the_files_are_those_of_the_table() -> None:
    check = [sys.executable, str(CONFIGS_DIR.parent / "tools" / "write_paper_recipes.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_steps_that_the_paper_can_mean_are_among_the_checkpoints_that_stay() -> None:
    for run in paper_runs():
        config = load(CONFIGS_DIR / "paper" / f"{run.recipe}.yaml")
        assert config.checkpoint.every == CHECKPOINT_EVERY
        saved = [step for step in range(1, config.steps + 1) if step % CHECKPOINT_EVERY == 0 or step == config.steps]
        first, last = PAPER_STEPS[run.method]
        assert set(range(first, last + 1, CHECKPOINT_EVERY)) <= set(saved[-config.checkpoint.keep :])


@pytest.mark.parametrize("method", ["co_rewarding_i", "co_rewarding_ii"])
def test_a_run_of_its_own_layout_is_as_long_as_the_papers(method: str) -> None:
    plain = load(CONFIGS_DIR / f"math_{method}.yaml")
    paper = load(CONFIGS_DIR / "paper" / f"qwen3_1_7b_base_math_{method}.yaml")
    for key in ("steps", "data", "loss", "rewards", "teacher", "validation", "checkpoint", "guard"):
        assert getattr(plain, key) == getattr(paper, key)


def test_every_large_model_has_a_recipe_of_both_methods() -> None:
    found = {(load(r).data.train_files[0].parent.name, load(r).model.hf_path.name, load(r).method) for r in RECIPES}
    for method in ("co_rewarding_i", "co_rewarding_ii"):
        assert {("math", model, method) for model in LARGE} <= found
    assert {model for _, model, _ in found} <= set(CONFIGS)


def test_layouts_go_from_8_to_256_gpus_of_either_size() -> None:
    sizes = {size(recipe) for recipe in RECIPES}
    for gigabytes in (80, 141):
        numbers = {num_gpus for num_gpus, of in sizes if of == gigabytes}
        assert min(numbers) == 8
        assert max(numbers) == 256


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_mixtures_of_experts_and_no_other_models_correct_for_what_engines_sample_otherwise(recipe: Path) -> None:
    config = load(recipe)
    routed = architecture_of(config.model).experts is not None
    assert config.loss.mismatch_correction == ("tis" if routed else "off")


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


def test_the_small_run_of_the_page_on_reproducing_can_be_had_of_every_recipe() -> None:
    """The overrides of docs/reproduce.md, on two processes: nothing of a layout for many GPUs is left."""
    page = (CONFIGS_DIR.parent / "docs" / "reproduce.md").read_text()
    command = re.search(r"megatron-coreward train (\S+) (\\\n    run_dir=runs/tiny .*?)\n```", page, re.DOTALL)
    assert command is not None
    overrides = command[2].replace("\\\n", " ").split()
    assert (CONFIGS_DIR.parent / command[1]).is_file()
    for run in paper_runs():
        config = load_config(CONFIGS_DIR / "paper" / f"{run.recipe}.yaml", overrides)
        assert list(setting_problems(config)) == []
        engines = config.rollout.num_engines * config.rollout.tensor_parallel
        assert (config.actor.world_size, engines, config.steps) == (1, 1, 2)
