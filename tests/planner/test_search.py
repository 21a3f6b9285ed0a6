"""Search and plan: what fits is proposed, what does not is named with the nearest layout that does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_coreward.commands import plan as command
from megatron_coreward.commands.arguments import Parser
from megatron_coreward.errors import InputError
from megatron_coreward.planner.hardware import assume
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.planner.plan import (
    Placement,
    check_layout,
    fixed_problems,
    make_plan,
    placement_problems,
)
from megatron_coreward.planner.search import HEADROOM, distance, nearest, search
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
        room = (1 - HEADROOM) * plan.machine.gpu.memory_bytes
        assert all(stage.peak + asleep <= room for stage in plan.stages)
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)


@pytest.mark.long
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
        rollout={"num_engines": 16, "gpu_memory_utilization": 0.95},
    )
    shared, too_many = make_plan(c, EIGHT, machine("h100", "colocated")).problems[-2:]
    assert "while engines sample" in shared
    assert "16 engine workers for 8 actor ranks" in too_many


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "gpu", "num_gpus", "settings"),
    [
        ("Qwen3-235B-A22B", "h200", 129, {}),
        ("Qwen3-235B-A22B", "h200", 400, {}),
        ("Qwen2.5-72B", "h200", 33, {}),
        (
            "Qwen2.5-7B",  # of 28 heads, which 8 GPUs do not divide
            "h100",
            64,
            {
                "data": {"max_prompt_tokens": 1024},
                "rollout": {"max_response_tokens": 130048},
                "actor": {"tokens_per_microbatch": 131072},
            },
        ),
    ],
)
def test_there_may_be_more_gpus_than_a_layout_uses(
    model: str, gpu: str, num_gpus: int, settings: dict[str, Any]
) -> None:
    found = search(config(model, **settings), published_architecture(model), machine(gpu), num_gpus)
    assert found
    assert all(plan.num_gpus <= num_gpus and plan.problems == () for plan in found)
    for plan in found:  # none is left unused for nothing
        assert all(other.seconds > plan.seconds for other in found if other.num_gpus > plan.num_gpus)


@pytest.mark.long
@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_more_gpus_are_never_worse(placement: Placement) -> None:
    c = config("Qwen3-8B-Base")
    best = [search(c, EIGHT, machine("h200", placement), number)[0].seconds for number in range(8, 20)]
    assert best == sorted(best, reverse=True)


def test_what_no_layout_changes_is_said_at_once() -> None:
    c = config("Qwen3-8B-Base", rollout={"max_response_tokens": 40_000}, actor={"tokens_per_microbatch": 65536})
    (problem,) = fixed_problems(c, EIGHT, machine())
    assert problem.endswith("40512 tokens, the model has positions for 32768")
    assert nearest(c, EIGHT, machine(), 8) is None
    tall = config("Qwen3-8B-Base", actor={"tensor_parallel": 3, "pipeline_parallel": 7, "data_parallel": 5})
    assert fixed_problems(tall, EIGHT, machine()) == []


@pytest.mark.long
def test_no_key_of_a_layout_keeps_others_from_being_found() -> None:
    """Stages and experts that are cut in a way of their own, and engines of the teacher alone."""
    sizes = {"tensor_parallel": 4, "pipeline_parallel": 4, "data_parallel": 2, "sequence_parallel": True}
    ends = {"first_stage_layers": 13, "last_stage_layers": 11, "expert_parallel": 2, "expert_tensor_parallel": 4}
    c = config(
        "Qwen3-30B-A3B",
        "co_rewarding_ii",
        actor={**sizes, **ends},
        rollout={"num_engines": 4, "tensor_parallel": 4, "gpu_memory_utilization": 0.9},
        teacher={"engines": 2},
    )
    arch, on = published_architecture("Qwen3-30B-A3B"), machine("h200")
    assert make_plan(c, arch, on).config.teacher.engines == 2
    assert fixed_problems(c, arch, on) == []
    found = search(c, arch, on, 32)
    assert found
    assert all(plan.config.rollout.num_engines > 2 for plan in found)


def test_engines_of_the_teacher_alone_are_refused_where_all_share_the_gpus_of_the_actor() -> None:
    c = config("Qwen3-8B-Base", "co_rewarding_ii", rollout={"num_engines": 3}, teacher={"engines": 2})
    (problem,) = fixed_problems(c, EIGHT, machine("h200", "colocated"))
    assert problem.startswith("teacher.engines: 2 are for engines with GPUs of their own")


def test_fp8_needs_a_gpu_that_has_it() -> None:
    """As a run would say (`accelerator.machine_problems`), before there is a machine to ask."""
    fp8 = {"actor": {"fp8": "blockwise"}, "rollout": {"quantization": "fp8"}}
    c = config("Qwen3-8B-Base", **fp8, loss={"mismatch_correction": "tis"})
    actor, engines = make_plan(c, EIGHT, machine("a100")).problems[:2]
    assert actor == "actor.fp8: blockwise needs compute capability 9.0 or more, found 8.0; allowed on this GPU: null"
    assert engines.startswith("rollout.quantization: fp8 needs compute capability 8.9 or more, found 8.0")
    assert fixed_problems(c, EIGHT, machine("h100")) == []
    (blackwell,) = fixed_problems(config("Qwen3-8B-Base", actor={"fp8": "mxfp8"}), EIGHT, machine("h200"))
    assert blackwell.endswith("found 9.0; allowed on this GPU: delayed, tensorwise, blockwise")


def test_ranks_and_engines_have_to_fit_on_nodes() -> None:
    """The rules of a run (`planner.placement`), with nodes of 8 GPUs unless a test says otherwise."""
    c = config("Qwen3-8B-Base", rollout={"tensor_parallel": 16})
    assert placement_problems(c, machine(), None) == [
        "rollout.tensor_parallel: an engine of 16 GPUs, and the largest node has 8; allowed: up to 8, on one node"
    ]
    assert placement_problems(c, machine(gpus_per_node=16), None) == []
    split = config("Qwen3-8B-Base", actor={"tensor_parallel": 4, "sequence_parallel": True, "data_parallel": 3})
    assert placement_problems(split, machine(), 13) == []
    (problem,) = placement_problems(split, machine(gpus_per_node=6), 13)  # nodes of 6, 6 and 1
    assert "the run needs 13 GPUs (12 actor ranks in groups of 4 on a node" in problem


def test_assumptions_are_checked() -> None:
    assert assume(["decode_efficiency=0.7", "gpus_per_node=4"]).gpus_per_node == 4
    for bad, message in (
        ("speed=1", "unknown key 'speed'"),
        ("runtime_gib=-1", "above 0"),
        ("runtime_gib=x", "above 0"),
        ("runtime_gib=nan", "above 0"),
        ("gpus_per_node=0.5", "a whole number"),
        ("mean_response=40", "a share; allowed: above 0, at most 1"),
    ):
        with pytest.raises(InputError, match=message):
            assume([bad])


def test_layouts_for_rollouts_that_are_drawn_ahead_are_found_by_what_overlaps() -> None:
    """None of those that are best if phases follow each other is better then, and the order is that of the seconds."""
    own = {"rollout": {"max_staleness": 1}, "loss": {"mismatch_correction": "tis"}, "checkpoint": {"every": 0}}
    ahead = config("Qwen3-1.7B-Base", **own).model_copy(update={"steps": 100})
    arch = published_architecture("Qwen3-1.7B-Base")
    found = search(ahead, arch, machine(), 8)
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    one_by_one = search(config("Qwen3-1.7B-Base"), arch, machine(), 8)[0]
    same_layout = ahead.model_copy(update={"actor": one_by_one.config.actor})
    rollout = one_by_one.config.rollout.model_copy(update={"max_staleness": 1})
    other = make_plan(same_layout.model_copy(update={"rollout": rollout}), arch, machine())
    assert found[0].seconds <= other.seconds
    actor, engines = found[0].actor, found[0].rollout.phase.seconds
    balance = engines / (actor.scoring.seconds + actor.update.seconds)
    before = one_by_one.rollout.phase.seconds / (one_by_one.actor.scoring.seconds + one_by_one.actor.update.seconds)
    assert abs(balance - 1) <= abs(before - 1)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(arguments: list[str]) -> None:
    parser = Parser()
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


def test_plan_prints_memory_time_and_outcome_without_the_weights(
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
    assert "does not fit" not in page  # the error says it once
    assert "needs" not in page
    with pytest.raises(InputError, match="takes 4 GPUs, --gpus is 2"):
        run([recipe, "--gpus", "2"])
    assert "\nfits\n" not in capsys.readouterr().out


def test_a_layout_that_the_model_cannot_take_is_named_as_training_would(recipe: str) -> None:
    with pytest.raises(InputError, match=r"actor.tensor_parallel: 3 does not divide the model's attention heads"):
        run([recipe, "actor.tensor_parallel=3"])


def test_settings_that_contradict_each_other_are_not_said_to_want_more_gpus(recipe: str) -> None:
    overrides = ["actor.min_lr=1", "rollout.top_p=0.9"]
    with pytest.raises(InputError) as raised:
        run([recipe, *overrides])
    first, *others = str(raised.value).splitlines()
    assert first == f"{recipe}: settings that cannot work, whatever the GPUs:"
    assert [line.partition(":")[0] for line in others] == ["loss.mismatch_correction", "actor.min_lr"]
    with pytest.raises(
        InputError, match=r"whatever the GPUs:\n(.*\n)+.* does not fit on 2 x h100:\nthe layout takes 4 GPUs"
    ):
        run([recipe, *overrides, "--gpus", "2"])


def test_search_lists_overrides_that_plan_accepts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([recipe, "--search", "--gpus", "8", "--top", "2"])
    _, first, _ = capsys.readouterr().out.splitlines()
    run([recipe, *(word for word in first.split() if "=" in word), "--gpus", "8"])
    assert capsys.readouterr().out.rstrip().endswith("fits")
    with pytest.raises(InputError, match="--gpu: 'h300' is not known; allowed: a100, h100, h200"):
        run([recipe, "--gpu", "h300"])


@pytest.mark.parametrize("asked", [["rollout.placement=colocated"], ["--placement", "colocated"]])
def test_a_search_finds_colocated_layouts_of_few_gpus(
    recipe: str, capsys: pytest.CaptureFixture[str], asked: list[str]
) -> None:
    """Fewer than an engine could have of a node."""
    run([recipe, *asked, "--search", "--gpus", "2", "--top", "1", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["placement"], found["gpus"], found["fits"]) == ("colocated", 2, True)
    run([recipe, *asked, "--search", "--gpus", "2", "--top", "1"])
    _, first, *_ = capsys.readouterr().out.splitlines()
    overrides = [word for word in first.split() if "=" in word]
    assert "rollout.placement=colocated" in overrides
    run([recipe, *overrides, "--gpus", "2"])  # behind the recipe, whose own placement may be the other
    assert capsys.readouterr().out.rstrip().endswith("fits")


def test_a_plan_is_of_the_placement_that_is_asked_for(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["rollout.placement=colocated", "rollout.num_engines=4", "actor.recompute=full"]
    with pytest.raises(InputError, match="rollout.placement: colocated with 4 engine ranks and 2 actor ranks"):
        run([recipe, *own])
    run([recipe, *own, "--placement", "disaggregated"])
    assert capsys.readouterr().out.rstrip().endswith("fits")


def test_a_search_that_cannot_succeed_names_the_cause(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = ("rollout.max_response_tokens=40000", "actor.tokens_per_microbatch=65536")
    for more in ([], ["--search", "--gpus", "64"]):
        with pytest.raises(InputError, match="40512 tokens, the model has positions for 32768"):
            run([recipe, *long, *more])
        assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="fits on 64 x a100:\nactor.fp8: delayed needs compute capability 8.9"):
        run([recipe, "actor.fp8=delayed", "--gpu", "a100", "--search", "--gpus", "64"])


@pytest.mark.long
def test_a_layout_that_leaves_gpus_unused_fits(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([recipe, "--gpus", "7"])
    assert capsys.readouterr().out.rstrip().endswith("fits")
    with pytest.raises(InputError, match="rollout.tensor_parallel: an engine of 16 GPUs, and the largest node has 8"):
        run([recipe, "rollout.tensor_parallel=16", "--gpus", "64"])


@pytest.mark.parametrize("option", ["--top", "--gpus"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_of_layouts_and_gpus_are_at_least_1(recipe: str, option: str, value: str) -> None:
    with pytest.raises(InputError, match=f"{option}: {value}; allowed: 1 or more"):
        run([recipe, "--search", f"{option}={value}"])


def test_distance_counts_doublings_and_switches() -> None:
    one = config("Qwen3-8B-Base")
    other = config("Qwen3-8B-Base", actor={"tensor_parallel": 4, "recompute": "full"})
    assert distance(one, one) == 0
    assert distance(one, other) == distance(other, one) == 3
