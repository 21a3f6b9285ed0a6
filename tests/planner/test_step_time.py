"""Seconds of a step: they follow the work, and come near what a comparable system has published."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_coreward.planner.hardware import Assumptions, find_gpu
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.planner.plan import Plan, make_plan
from megatron_coreward.planner.report import ranking, report
from megatron_coreward.planner.step_time import layer_flops, transfers, work
from tests.planner.settings import config, machine

EIGHT = published_architecture("Qwen3-8B-Base")


def plan(
    method: str = "co_rewarding_i", gpu: str = "h100", assumptions: dict[str, Any] | None = None, **groups: Any
) -> Plan:
    rollout = {"num_engines": 4, "gpu_memory_utilization": 0.9, **groups.pop("rollout", {})}
    c = config("Qwen3-8B-Base", method, rollout=rollout, **groups)
    return make_plan(c, EIGHT, machine(gpu, **(assumptions or {})))


def test_the_work_of_a_step_is_what_the_loop_does() -> None:
    one = work(config("Qwen3-8B-Base", "co_rewarding_i"), Assumptions())
    two = work(config("Qwen3-8B-Base", "co_rewarding_ii"), Assumptions())
    assert (one.trained, one.labelled, one.passes, one.syncs) == (2048, 0, 1, 1)
    assert (two.trained, two.labelled, two.passes, two.syncs) == (1024, 1024, 1, 2)
    assert work(config("Qwen3-8B-Base", "entropy"), Assumptions()).passes == 2  # statistics of the policy as well
    assert work(config("Qwen3-8B-Base", loss={"kl_coef": 0.0}), Assumptions()).passes == 0
    assert one.response == pytest.approx(0.4 * 3072)


def test_a_forward_pass_costs_two_operations_a_weight_and_reads_the_context() -> None:
    assert layer_flops(EIGHT, 0) == 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288)
    assert layer_flops(EIGHT, 1000) - layer_flops(EIGHT, 0) == 4 * 4096 * 1000


def test_more_ranks_make_updates_shorter_and_more_engines_rollouts() -> None:
    one, four = plan(), plan(actor={"data_parallel": 4})
    assert one.actor.update.seconds_by["compute"] == pytest.approx(4 * one_quarter(four), rel=0.01)
    fewer = plan(rollout={"num_engines": 2})
    assert fewer.rollout.phase.seconds > 1.3 * one.rollout.phase.seconds


def one_quarter(four: Plan) -> float:
    return four.actor.update.seconds_by["compute"]


def test_recomputation_pipelines_and_tensor_parallelism_cost_time() -> None:
    plain = plan(actor={"data_parallel": 4}).actor.update
    assert (
        plan(actor={"data_parallel": 4, "recompute": "full"}).actor.update.seconds > 1.25 * plain.seconds
    )  # the head is, anyway
    deep = plan(actor={"pipeline_parallel": 4}).actor.update
    interleaved = plan(actor={"pipeline_parallel": 4, "virtual_pipeline": 3}).actor.update
    assert deep.seconds_by["pipeline bubble"] == pytest.approx(3 * interleaved.seconds_by["pipeline bubble"], rel=0.05)
    wide = plan(actor={"tensor_parallel": 4, "sequence_parallel": True}).actor.update
    assert wide.seconds_by["tensor-parallel link"] > 0 == plain.seconds_by["tensor-parallel link"]


def test_decoding_is_bound_by_memory_and_longer_for_a_teacher() -> None:
    one, two = plan("co_rewarding_i"), plan("co_rewarding_ii")
    assert one.rollout.phase.bound == "HBM"
    assert two.rollout.phase.seconds > one.rollout.phase.seconds  # one after the other, each waits for its longest
    assert plan(gpu="h200").rollout.phase.seconds < one.rollout.phase.seconds
    assert plan(assumptions={"mean_response": 0.8}).rollout.phase.seconds > one.rollout.phase.seconds
    crowded = plan(rollout={"gpu_memory_utilization": 0.35})
    assert crowded.rollout.concurrent < one.rollout.concurrent
    assert crowded.rollout.phase.seconds > one.rollout.phase.seconds


def test_the_sync_moves_what_the_transfer_plan_says() -> None:
    c = config("Qwen3-8B-Base", actor={"data_parallel": 2}, rollout={"num_engines": 4})
    moved = transfers(c, EIGHT)
    busiest = float(max(moved.bytes_sent.max(), moved.bytes_received.max()))
    planned = make_plan(c, EIGHT, machine(), busiest)
    network = busiest / (0.7 * find_gpu("h100").network_bytes_s)
    assert planned.sync.seconds_by["network"] == pytest.approx(network)
    coarse = make_plan(
        c.model_copy(update={"sync": c.sync.model_copy(update={"bucket_mib": 1024.0})}), EIGHT, machine()
    )
    few, many = (p.sync.seconds_by["messages"] for p in (coarse, planned))
    assert few == pytest.approx(many / 4, rel=0.1)
    assert make_plan(c, EIGHT, machine()).sync.seconds == pytest.approx(planned.sync.seconds, rel=0.02)  # the estimate


def learning(planned: Plan) -> float:
    return planned.actor.scoring.seconds + planned.actor.update.seconds


AHEAD = {"rollout": {"max_staleness": 1}, "loss": {"mismatch_correction": "tis"}}
STREAMED = {**AHEAD, "rollout": {"max_staleness": 1, "schedule": "streaming"}}


@pytest.mark.parametrize("ranks", [1, 8])
def test_rollouts_that_are_drawn_ahead_hide_behind_the_update_or_the_update_behind_them(ranks: int) -> None:
    """All steps but the first are drawn while the actors learn from the one before."""
    one_by_one, ahead = (
        plan(actor={"data_parallel": ranks}, steps=100, checkpoint={"every": 0}, **more) for more in ({}, AHEAD)
    )
    hidden = min(ahead.rollout.phase.seconds, learning(ahead))
    assert (learning(ahead) > ahead.rollout.phase.seconds) is (ranks == 1)  # one of each
    assert one_by_one.overlapped == 0
    assert ahead.seconds == pytest.approx(one_by_one.seconds - 0.99 * hidden)


def test_nothing_is_drawn_ahead_across_a_checkpoint_unless_it_is_streamed() -> None:
    drawn = [plan(steps=100, checkpoint={"every": every}, **AHEAD).overlapped for every in (0, 10, 1)]
    assert drawn[1:] == pytest.approx([0.9 / 0.99 * drawn[0], 0.0])
    assert plan(steps=100, checkpoint={"every": 1}, **STREAMED).overlapped == pytest.approx(drawn[0])


def test_a_teacher_that_shares_the_engines_is_not_drawn_while_actors_learn() -> None:
    planned = plan("co_rewarding_ii", steps=100, checkpoint={"every": 0}, **AHEAD)
    of_policy = planned.rollout.of_policy
    assert 0.4 < of_policy / planned.rollout.phase.seconds < 0.6
    assert planned.overlapped == pytest.approx(0.99 * min(of_policy, learning(planned)))


def test_engines_and_actors_that_alternate_do_not_overlap() -> None:
    c = config("Qwen3-8B-Base", **AHEAD).model_copy(update={"steps": 100})
    assert make_plan(c, EIGHT, machine(placement="colocated")).overlapped == 0


def test_a_plan_says_which_overlap_it_does_not_count() -> None:
    teacher = {"engines": 1, "lookahead": 2, "early_stop": True}
    asked = {**STREAMED, "teacher": teacher, "steps": 100}
    streamed = plan("co_rewarding_ii", **asked)
    keys = ("rollout.schedule: streaming", "teacher.engines: 1", "teacher.lookahead: 2", "teacher.early_stop: true")
    assert [note.startswith(key) for note, key in zip(streamed.notes, keys, strict=True)] == [True] * 4
    page = report(streamed, "Qwen3-8B-Base")
    assert page.count("\n  not counted: ") == 4
    assert "\n  overlapped " in page
    assert streamed.to_json()["step"]["not_counted"] == streamed.notes
    assert ranking([streamed]).count("\n  not counted: ") == 4
    assert "not counted" not in report(plan("co_rewarding_ii"), "Qwen3-8B-Base")
    assert "overlapped" not in report(plan("co_rewarding_ii"), "Qwen3-8B-Base")


# NeMo RL 0.4, GRPO on DGX H100, on policy, Megatron-core, colocated, 2,048 samples of up to 4,096 tokens a step in four
# updates (NVIDIA-NeMo/RL docs/about/performance-summary.md): model, GPUs, mean response, seconds a step, layouts.
# Prompts from tokens/s/GPU: about 120 tokens. Assumed: log-probs of policy and reference, 256 sequences an engine.
NEMO_RL = [
    ("Llama-3.1-8B", 16, 1060, 97.7, {"pipeline_parallel": 2, "data_parallel": 8}, (16, 1)),
    ("Qwen3-32B", 32, 3206, 393, {"tensor_parallel": 4, "pipeline_parallel": 4, "data_parallel": 2}, (8, 4)),
    ("Qwen3-30B-A3B", 32, 3154, 225, {"tensor_parallel": 2, "expert_parallel": 8, "data_parallel": 16}, (8, 4)),
]


def grpo(model: str, response: float, actor: dict[str, Any], engines: tuple[int, int]) -> Plan:
    c = config(
        model,
        "majority_voting",
        data={"batch_size": 64},
        actor={**actor, "sequence_parallel": "tensor_parallel" in actor, "tokens_per_microbatch": 4608},
        loss={"updates_per_batch": 4},
        rollout={
            "n": 32,
            "num_engines": engines[0],
            "tensor_parallel": engines[1],
            "max_response_tokens": 3584,
            "gpu_memory_utilization": 0.6,
        },
    )
    assumed = machine("h100", "colocated", mean_prompt=120 / 512, mean_response=response / 3584)
    return make_plan(c, published_architecture(model), assumed)


@pytest.mark.parametrize(("model", "gpus", "response", "seconds", "actor", "engines"), NEMO_RL, ids=lambda v: str(v))
def test_published_step_times_are_met_within_two_fifths(
    model: str, gpus: int, response: float, seconds: float, actor: dict[str, Any], engines: tuple[int, int]
) -> None:
    planned = grpo(model, response, actor, engines)
    assert planned.num_gpus == gpus
    assert 0.6 < planned.seconds / seconds < 1.1


def test_published_phases_that_set_no_assumption_are_met_within_a_fifth() -> None:
    """NVIDIA-NeMo/RL issue 959: NeMo RL 0.3 on one node of H100s, Llama-3.1-8B, mean response 795 tokens: training
    28 s, generation 58 s, log-probs 18 s. Layout and batch are assumed; the issue does not name them."""
    planned = grpo("Llama-3.1-8B", 795, {"pipeline_parallel": 2, "data_parallel": 4}, (8, 1))
    assert planned.actor.update.seconds == pytest.approx(28, rel=0.2)
    assert planned.rollout.phase.seconds == pytest.approx(58, rel=0.2)
    assert planned.actor.scoring.seconds == pytest.approx(18, rel=0.2)


def test_routing_to_fewer_experts_reads_and_computes_less() -> None:
    arch = published_architecture("Qwen3-30B-A3B")
    assert arch.experts is not None
    sparser = replace(arch, experts=replace(arch.experts, top_k=4))
    assert layer_flops(sparser, 0) < layer_flops(arch, 0)
