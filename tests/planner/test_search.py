"""Search and plan: what fits is proposed, what does not is named with the nearest layout that does."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_coreward.commands import plan as command
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import assume
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.planner.plan import Placement, check_layout, make_plan
from megatron_coreward.planner.search import distance, nearest, search
from tests.planner.settings import config, machine

EIGHT = published_architecture("Qwen3-8B-Base")


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_what_is_proposed_is_allowed_fits_and_uses_the_gpus(placement: Placement) -> None:
    found = search(config("Qwen3-8B-Base", "co_rewarding_ii"), EIGHT, machine("h200", placement), 16)
    assert len(found) > 3
    for plan in found:
        check_layout(plan.config, EIGHT)
        assert plan.num_gpus == 16
        assert plan.problems == ()
        asleep = plan.engine.asleep if placement == "colocated" else 0
        assert all(stage.peak + asleep <= plan.machine.gpu.memory_bytes for stage in plan.stages)
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)


def test_experts_are_spread_where_there_are_some() -> None:
    arch = published_architecture("Qwen3-30B-A3B")
    found = search(config("Qwen3-30B-A3B"), arch, machine("h200"), 16)
    assert any(plan.config.actor.expert_parallel > 1 for plan in found)


def test_a_layout_that_does_not_fit_names_the_part_and_the_nearest_fits() -> None:
    c = config("Qwen3-8B-Base", actor={"data_parallel": 4}, rollout={"num_engines": 4, "gpu_memory_utilization": 0.1})
    plan = make_plan(c, EIGHT, machine())
    actor, engine = plan.problems
    assert actor.startswith("actor, stage 0: needs")
    assert "most of it: activations" in actor
    assert "rollout.gpu_memory_utilization 0.1 is 8.0 GiB" in engine
    closest = nearest(c, EIGHT, machine(), 8)
    assert closest is not None
    assert closest.problems == ()
    for other in search(c, EIGHT, machine(), 8):
        assert distance(c, closest.config) <= distance(c, other.config)


def test_where_nothing_fits_more_gpus_are_tried() -> None:
    c = config("Llama-3.1-70B")
    arch = published_architecture("Llama-3.1-70B")
    assert search(c, arch, machine(), 8) == []
    closest = nearest(c, arch, machine(), 8)
    assert closest is not None
    assert closest.num_gpus in (32, 64)


def test_colocated_engines_and_actor_share_the_memory() -> None:
    c = config(
        "Qwen3-8B-Base",
        actor={"tensor_parallel": 4, "sequence_parallel": True, "tokens_per_microbatch": 4096, "data_parallel": 2},
        rollout={"num_engines": 16, "gpu_memory_utilization": 0.9},
    )
    shared, too_many = make_plan(c, EIGHT, machine("h100", "colocated")).problems[-2:]
    assert "while engines sample" in shared
    assert "16 engine workers for 8 actor ranks" in too_many


def test_assumptions_are_checked() -> None:
    assert assume(["decode_efficiency=0.7", "gpus_per_node=4"]).gpus_per_node == 4
    for bad, message in (
        ("speed=1", "unknown key 'speed'"),
        ("runtime_gib=-1", "above 0"),
        ("runtime_gib=x", "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            assume([bad])


# ---- the command -----------------------------------------------------------------------------------------------------


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    options = parser.parse_args(["plan", *arguments])
    options.run(options)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    tree: dict[str, Any] = {
        "run_dir": "run",
        "steps": 1,
        "method": "co_rewarding_ii",
        "model": {"hf_path": "models/Qwen3-1.7B-Base"},
        "data": {"train_files": ["a"]},
        "actor": {"tensor_parallel": 2, "sequence_parallel": True, "tokens_per_microbatch": 4096},
        "rollout": {"num_engines": 2, "gpu_memory_utilization": 0.9},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_plan_prints_memory_time_and_verdict_without_the_weights(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run([recipe])
    page = capsys.readouterr().out
    assert "Qwen3-1.7B-Base, co_rewarding_ii, bfloat16, on 4 x h100" in page
    for line in (
        "weights",
        "gradients",
        "optimizer",
        "teacher",
        "activations",
        "scoring",
        "key-value cache",
        "rollout",
    ):
        assert f"\n  {line}" in page
    assert page.rstrip().endswith("fits")


def test_plan_as_json_has_the_same_in_bytes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([recipe, "actor.data_parallel=2", "--json", "--gpu", "h200"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert (answer["gpus"], answer["gpu"]) == (6, "h200")
    (stage,) = answer["stages"]
    assert stage["peak"] < answer["gpu_bytes"]
    assert answer["step"]["seconds"] == pytest.approx(sum(p["seconds"] for p in answer["step"]["phases"].values()))


def test_plan_refuses_what_does_not_fit_and_says_what_does(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"does not fit on 4 x h100:\nactor, stage 0: needs"):
        run([recipe, "model.hf_path=models/Qwen3-8B-Base"])
    page = capsys.readouterr().out
    assert "nearest layout that fits" in page
    assert "actor.tensor_parallel=" in page
    with pytest.raises(InputError, match="takes 4 GPUs, --gpus is 2"):
        run([recipe, "--gpus", "2"])


def test_a_layout_that_the_model_cannot_take_is_named_as_training_would(recipe: str) -> None:
    with pytest.raises(InputError, match=r"actor.tensor_parallel: 3 does not divide the model's attention heads"):
        run([recipe, "actor.tensor_parallel=3"])


def test_search_lists_overrides_that_plan_accepts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([recipe, "--search", "--gpus", "8", "--top", "2"])
    _, first, _ = capsys.readouterr().out.splitlines()
    run([recipe, *(word for word in first.split() if "=" in word), "--gpus", "8"])
    assert capsys.readouterr().out.rstrip().endswith("fits")
    with pytest.raises(InputError, match="--gpu: 'h300' is not known; allowed: a100, h100, h200"):
        run([recipe, "--gpu", "h300"])


def test_distance_counts_doublings_and_switches() -> None:
    one = config("Qwen3-8B-Base")
    other = config("Qwen3-8B-Base", actor={"tensor_parallel": 4, "recompute": "full"})
    assert distance(one, one) == 0
    assert distance(one, other) == distance(other, one) == 3
