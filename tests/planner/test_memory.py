"""Bytes that cannot be allocated on CPU: activations, logits, caches; and figures that others have published."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.planner.hardware import GIB, Assumptions
from megatron_coreward.planner.memory import (
    activation_bytes,
    actor_memory,
    cache_bytes_per_token,
    engine_memory,
    in_flight,
    scoring_bytes,
    worker_elements,
)
from megatron_coreward.planner.models import published_architecture
from megatron_coreward.planner.parameters import stage_parameters
from megatron_coreward.planner.step_time import num_parameters
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from tests.planner.settings import config, machine

EIGHT = published_architecture("Qwen3-8B-Base")


@pytest.mark.parametrize("data_parallel", [1, 2, 8])
def test_bytes_a_parameter_are_those_that_megatron_documents(data_parallel: int) -> None:
    """6 + 12 / data-parallel size (Megatron Bridge, "Theoretical Memory Estimator")."""
    c = config("Qwen3-8B-Base", actor={"data_parallel": data_parallel})
    (stage,) = actor_memory(c, EIGHT, Assumptions())
    per_parameter = sum(stage.static[part] for part in ("weights", "gradients", "optimizer")) / num_parameters(EIGHT)
    assert per_parameter == pytest.approx(6 + 12 / data_parallel, rel=1e-4)


def test_the_teacher_costs_eight_bytes_over_data_parallel_ranks_and_a_copy_of_the_model() -> None:
    held = stage_parameters(EIGHT, ActorLayout.of(ActorSettings(data_parallel=4)), 0)
    for method, expected in (("co_rewarding_i", 0), ("co_rewarding_ii", 8 * held.owned + 2 * held.numel)):
        c = config("Qwen3-8B-Base", method, actor={"data_parallel": 4})
        (stage,) = actor_memory(c, EIGHT, Assumptions())
        assert stage.static["teacher"] == expected
        assert (stage.static["reference"] == 0) == (method == "co_rewarding_ii")  # the teacher is its reference


@pytest.mark.parametrize("offloaded", ["optimizer", "teacher"])
def test_what_is_offloaded_is_there_for_the_steps_that_need_it_alone(offloaded: str) -> None:
    """Beside activations it is not; while the optimizer or the EMA steps it is, and then there are no activations."""
    actor = {"data_parallel": 4, "tokens_per_microbatch": 8192}
    (kept,) = actor_memory(config("Qwen3-8B-Base", "co_rewarding_ii", actor=actor), EIGHT, Assumptions())
    away = actor | {f"offload_{offloaded}": True}
    (stage,) = actor_memory(config("Qwen3-8B-Base", "co_rewarding_ii", actor=away), EIGHT, Assumptions())
    held = stage_parameters(EIGHT, ActorLayout(data_parallel=4), 0)
    saved = {"optimizer": 12, "teacher": 8}[offloaded] * held.owned
    assert kept.static[offloaded] - stage.static[offloaded] == kept.resident - stage.resident == saved
    assert stage.step[f"{offloaded}'s state"] == saved
    assert stage.update == kept.update
    assert stage.peak < kept.peak
    assert stage.peak >= stage.resident + saved


def test_an_actor_that_lends_its_gpu_keeps_what_the_canary_makes_of_weights_in_fp8() -> None:
    """A byte each of one model's layers; scales with a memory are left alone, and FP8 weights need no copies."""
    (bf16,) = actor_memory(config("Qwen3-8B-Base", "co_rewarding_i"), EIGHT, Assumptions())
    outside = 2 * 151_936 * 4_096  # embedding and head, which are never in FP8
    for fp8, copied in (
        ({"fp8": "tensorwise"}, num_parameters(EIGHT) - outside),
        ({"fp8": "tensorwise", "fp8_params": True}, 0),
        ({"fp8": "delayed"}, 0),
    ):
        (stage,) = actor_memory(config("Qwen3-8B-Base", "co_rewarding_i", actor=fp8), EIGHT, Assumptions())
        assert stage.while_sampling - bf16.while_sampling == pytest.approx(copied, rel=1e-3)  # norms stay as they are


def test_a_step_of_the_optimizer_or_the_ema_takes_memory_by_the_shard() -> None:
    held = stage_parameters(EIGHT, ActorLayout(data_parallel=4), 0)
    assert held.largest == 151_936 * 4096
    (stage,) = actor_memory(config("Qwen3-8B-Base", actor={"data_parallel": 4}), EIGHT, Assumptions())
    assert stage.step["Adam"] == 8 * held.largest
    (with_teacher,) = actor_memory(
        config("Qwen3-8B-Base", "co_rewarding_ii", actor={"data_parallel": 4}), EIGHT, Assumptions()
    )
    assert with_teacher.step["EMA"] == 12 * held.largest
    assert "Adam" not in with_teacher.step  # one after the other


def test_layers_in_flight_are_those_of_the_schedules() -> None:
    plain = ActorLayout(pipeline_parallel=4)
    assert [in_flight(plain, stage, 32) for stage in range(4)] == [32, 24, 16, 8]
    # Chunks of 4 layers: 2 x 3 + 4 + 1 = 11 of them.
    interleaved = ActorLayout(pipeline_parallel=4, virtual_pipeline=2)
    assert [in_flight(interleaved, stage, 32) for stage in range(4)] == [44, 36, 28, 20]
    uneven = ActorLayout(pipeline_parallel=4, first_stage_layers=10, last_stage_layers=6)
    assert [in_flight(uneven, stage, 32) for stage in range(4)] == [40, 24, 16, 6]
    assert in_flight(ActorLayout(), 0, 32) == 32


def test_recomputation_tensor_and_sequence_parallelism_each_save_activations() -> None:
    def size(**layout: Any) -> int:
        return activation_bytes(EIGHT, ActorSettings(**layout), 0, 2, Assumptions())

    none, full = size(), size(recompute="full")
    inputs = 2 * 16384 * EIGHT.hidden_size * EIGHT.num_layers
    assert inputs < full < none / 6
    tp2, sp2 = size(tensor_parallel=2), size(tensor_parallel=2, sequence_parallel=True)
    assert none / 2 < tp2 < none
    assert sp2 == pytest.approx(none / 2, rel=1e-6)
    assert size(tokens_per_microbatch=4096) == pytest.approx(none / 4, rel=1e-6)


def test_only_the_last_stage_scores_and_a_chunk_of_logits_is_the_most_there_is() -> None:
    a = ActorSettings(pipeline_parallel=2, tensor_parallel=2, tokens_per_microbatch=1024)
    assert scoring_bytes(EIGHT, a, 0, 2) == 0
    few = scoring_bytes(EIGHT, a, 1, 2)
    assert few == 6 * 1024 * 152064 // 2 + 2 * 2**26 + 4 * 2 * 1024 * 4096
    many = scoring_bytes(EIGHT, a.model_copy(update={"tokens_per_microbatch": 65536}), 1, 2)
    assert many == 6 * 2**28 + 2 * 2**26 + 4 * 2 * 65536 * 4096


@pytest.mark.parametrize("name", ["Qwen3-8B-Base", "Qwen3-30B-A3B", "Qwen2.5-3B"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_worker_needs_what_the_transfer_plan_brings_it(name: str, tp: int) -> None:
    arch = published_architecture(name)
    needed = EngineLayout(tensor_parallel=tp).needed(0, arch)
    elements = 0
    for block in needed:
        numel = 1
        for start, stop in block.bounds:
            numel *= stop - start
        elements += numel
    assert worker_elements(arch, tp) == elements  # these vocabularies need no padding


def test_the_cache_has_what_the_engine_leaves() -> None:
    assert cache_bytes_per_token(EIGHT, 1, 2) == 2 * 36 * 8 * 128 * 2  # 144 KiB
    assert cache_bytes_per_token(EIGHT, 16, 2) == 2 * 36 * 128 * 2  # a head cannot be cut
    c = config("Qwen3-8B-Base", rollout={"gpu_memory_utilization": 0.9})
    gpu = machine().gpu
    engine = engine_memory(c, EIGHT, gpu, Assumptions())
    assert engine.claimed == engine.weights + engine.overhead + engine.cache
    assert engine.weights == 2 * num_parameters(EIGHT)
    assert 50 * GIB < engine.cache < 54 * GIB
    assert engine.cache_tokens == engine.cache // (144 * 1024)


def test_one_published_peak_is_met_within_a_tenth() -> None:
    """Llama-2-7B, BF16, DP 8, PP 2, TP 1, micro-batch 2, no recomputation: 69.1 GB measured on the first stage
    (NVIDIA/Megatron-LM pull request 482, review of 2023-12-12). The text leaves the sequence length open: 4,096, the
    model's own, is assumed here. It saves no checkpoint and has no reference."""
    shape = {"num_heads": 32, "num_kv_heads": 32, "ffn_size": 11008, "vocab_size": 32000, "max_position": 4096}
    arch = replace(published_architecture("Llama-3.1-8B"), **shape)  # type: ignore[arg-type]
    actor = {"pipeline_parallel": 2, "data_parallel": 8, "tokens_per_microbatch": 2 * 4096}
    c = config("Llama-2-7B", "majority_voting", actor=actor, loss={"kl_coef": 0.0})
    stage = actor_memory(c, arch, Assumptions())[0]
    without_saving = sum(stage.static.values()) + sum(stage.update.values()) + stage.runtime
    assert without_saving * (1 + Assumptions().fragmentation) == pytest.approx(69.1e9, rel=0.1)
