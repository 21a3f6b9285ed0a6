"""Names in queues: one rule that every backend takes, whatever the run directory is called; and room on the GPUs."""

import re
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.config.load import load_config
from megatron_coreward.errors import InputError
from megatron_coreward.launch.job import MAX_NAME, SUFFIX, check_gpu, is_inside, is_name, make_job, name_after
from tests.launch.arguments import ROOT, launch_command, write_recipe

RECIPES = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if "parts" not in path.parts)


def test_every_shipped_recipe_has_a_name_of_its_own() -> None:
    names = [make_job(load_config(recipe), None, 64, 8, None).name for recipe in RECIPES]
    assert len(RECIPES) >= 45
    assert all(is_name(name) for name in names)
    assert len(set(names)) == len(names)


@given(st.text(max_size=120))
def test_a_name_after_any_text_is_one_that_kubernetes_takes(text: str) -> None:
    """A DNS label (RFC 1035) of at most 47 characters, with the suffix."""
    name = name_after(text)
    assert is_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{name}{SUFFIX}")
    assert len(f"{name}{SUFFIX}") <= 47
    assert name_after(text) == name


def test_short_names_stay_and_long_ones_keep_their_beginning_and_differ() -> None:
    assert name_after("Run_1") == "run-1"
    assert name_after("2026-01-01") == "run-2026-01-01"
    assert name_after("") == "run"
    one, other = (name_after(f"qwen3_235b_a22b_math_co_rewarding_{kind}_256x141") for kind in ("i", "ii"))
    assert one != other
    assert len(one) == len(other) == MAX_NAME
    assert one.startswith("qwen3-235b-a22b-math-co-rewardi")


def test_a_derived_name_is_never_blamed_on_an_option(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path), [f"run_dir=runs/{'x' * 100}"])
    assert is_name(make_job(config, None, 1, 0, None).name)
    with pytest.raises(InputError, match="--name: 'x{100}'; allowed: up to 38"):
        make_job(config, "x" * 100, 1, 0, None)


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/runs", True),
        ("/runs/a/../b", True),
        ("/runs/../runs/b", True),
        ("/runs/..", False),
        ("/runs/../etc", False),
        ("/runs/a/../../etc", False),
        ("/runsx", False),
        ("runs", False),
    ],
)
def test_a_path_is_inside_a_folder_once_its_dots_are_followed(path: str, inside: bool) -> None:
    assert is_inside(PurePosixPath(path), ["/other", "/runs/"]) == inside


def test_engines_on_the_gpus_of_actor_ranks_stay_on_one_node(tmp_path: Path) -> None:
    layout = ["rollout.placement=colocated", "rollout.tensor_parallel=3", "rollout.num_engines=4"]
    config = load_config(write_recipe(tmp_path), [*layout, "actor.data_parallel=12"])
    assert make_job(config, None, 2, 6, None).nodes == 2
    with pytest.raises(InputError, match="rollout.tensor_parallel: 3 does not divide the 4 GPUs of a node"):
        make_job(config, None, 3, 4, None)


def test_fp8_is_refused_where_the_cluster_names_a_gpu_without_it(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path), ["actor.fp8=delayed", "model.dtype=bfloat16"])
    check_gpu(config, {"gpus": "H100:8", "constraint": None, "sbatch.gres": "gpu:8"})
    with pytest.raises(InputError, match="actor.fp8: delayed needs compute capability 8.9.*found 8.0.*gpus: A100-80GB"):
        check_gpu(config, {"gpus": "A100-80GB"})
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("kind: slurm\nconstraint: a100\n")
    words = ("slurm", str(write_recipe(tmp_path)), "actor.fp8=delayed", "--cluster", str(cluster), "--dry-run")
    with pytest.raises(InputError, match="actor.fp8: delayed .*constraint: a100"):
        launch_command(*words)
