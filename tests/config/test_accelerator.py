"""What GPUs must offer is checked before anything starts, and nothing is refused that they can do."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.config.accelerator import (
    RECIPES,
    GpuSupport,
    machine_problems,
    model_problems,
    parse_version,
    setting_problems,
    token_alignment,
)
from megatron_coreward.config.architecture import Architecture, parse_architecture
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import ActorSettings, RunConfig

QWEN3_1B7 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
H200 = GpuSupport(1, (9, 0), (13, 0), {"transformer-engine": (2, 11, 0)})


def config(*overrides: str) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": "run",
        "steps": 1,
        "method": "co_rewarding_ii",
        "model": {"hf_path": "model"},
        "data": {"train_files": ["train.parquet"]},
    }
    return parse_config(tree, list(overrides))


def architecture(**changes: Any) -> Architecture:
    return parse_architecture(QWEN3_1B7 | changes, "test")


def found(overrides: list[str], machine: GpuSupport = H200, arch: Architecture | None = None) -> list[str]:
    c = config(*overrides)
    return [*setting_problems(c), *model_problems(c, arch or architecture()), *machine_problems(c, machine)]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["actor.fp8=tensorwise"],
        ["actor.fp8=tensorwise", "actor.fp8_params=true", "actor.fp8_bf16_layers=1"],
        ["actor.fp8=blockwise", "actor.fp8_params=true"],
        ["actor.fp8=delayed"],
        ["rollout.quantization=fp8", "rollout.placement=colocated", "sync.transport=ipc"],
        ["sync.transport=nccl"],
        ["actor.router_replay=rollout"],
        ["actor.offload_optimizer=true", "actor.offload_teacher=true", "actor.recompute=selective"],
    ],
    ids=" ".join,
)
def test_what_an_h200_can_do_passes(overrides: list[str]) -> None:
    assert found(overrides) == []


@pytest.mark.parametrize(
    ("overrides", "machine", "words"),
    [
        (["actor.fp8=mxfp8"], H200, ["actor.fp8: mxfp8", "10.0", "found 9.0", "delayed, tensorwise, blockwise"]),
        (["actor.fp8=mxfp8"], GpuSupport(1, (12, 0), (13, 0), H200.packages), ["below 12.0"]),
        (["actor.fp8=tensorwise"], GpuSupport(1, (8, 0), (13, 0), H200.packages), ["8.9", "allowed on this GPU: null"]),
        (["actor.fp8=blockwise"], GpuSupport(1, (9, 0), (12, 6), H200.packages), ["CUDA 12.9", "12.6"]),
        (["actor.fp8=blockwise"], GpuSupport(1, (9, 0), (13, 0), {"transformer-engine": (2, 2)}), ["2.3 or later"]),
        (["actor.fp8=delayed"], GpuSupport(1, (9, 0), (13, 0)), ["transformer-engine", "not installed"]),
        (["actor.fp8=delayed"], GpuSupport(0), ["actor.fp8: delayed needs a GPU"]),
        (["actor.backend=te"], GpuSupport(1, (9, 0)), ["actor.backend: te", "not installed"]),
        (
            ["actor.gradient_accumulation_fusion=true"],
            GpuSupport(1, (9, 0)),
            ["transformer-engine", "allowed: auto, false"],
        ),
        (
            ["actor.gradient_accumulation_fusion=true", "actor.backend=local"],
            H200,
            ["actor.backend: local does not use", "allowed: auto, false"],
        ),
        (["rollout.quantization=fp8"], GpuSupport(1, (8, 0)), ["rollout.quantization", "8.9"]),
        (["rollout.quantization=fp8"], GpuSupport(0), ["rollout.quantization: fp8 needs a GPU"]),
        (["actor.router_replay=rollout"], GpuSupport(0), ["router_replay: rollout needs a GPU", "allowed: off"]),
        (["sync.transport=nccl"], GpuSupport(0), ["sync.transport: nccl needs a GPU"]),
    ],
)
def test_a_machine_that_lacks_something_is_reported(
    overrides: list[str], machine: GpuSupport, words: list[str]
) -> None:
    (problem,) = found(overrides, machine)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actor.fp8_params=true"], ["actor.fp8_params", "found null"]),
        (["actor.fp8_bf16_layers=1"], ["actor.fp8_bf16_layers", "found null"]),
        (["actor.fp8=delayed", "actor.fp8_params=true"], ["actor.fp8_params", "tensorwise, blockwise"]),
        (["actor.fp8=delayed", "actor.fp8_bf16_layers=1"], ["actor.fp8_bf16_layers", "allowed: 0"]),
        (["actor.fp8=tensorwise", "actor.fp8_bf16_layers=29"], ["28 layers"]),
        (["actor.fp8=tensorwise", "actor.backend=local"], ["actor.backend: local"]),
        (["actor.fp8=tensorwise", "model.dtype=float32"], ["model.dtype: float32", "bfloat16"]),
        (["actor.fp8=blockwise", "actor.tensor_parallel=32"], ["multiples of 128"]),
        (
            ["actor.backend=te", "actor.context_parallel=2", "model.dtype=float32"],
            ["actor.context_parallel: 2", "float32", "auto, local"],
        ),
        (["rollout.placement=colocated", "rollout.num_engines=2"], ["2 engine ranks and 1 actor ranks"]),
        (["rollout.placement=colocated", "sync.transport=nccl"], ["sync.transport: nccl"]),
        (["sync.transport=ipc"], ["sync.transport: ipc", "colocated"]),
    ],
)
def test_contradictions_are_reported(overrides: list[str], words: list[str]) -> None:
    problems = found(overrides)
    assert any(all(word in problem for word in words) for problem in problems), problems


def test_sizes_that_fp8_cannot_take_are_reported() -> None:
    problems = found(["actor.fp8=blockwise"], arch=architecture(hidden_size=2080, intermediate_size=6100))
    assert [problem.split(" is ")[1] for problem in problems] == ["2080", "6100"]


def test_packs_are_aligned_to_the_recipe_and_the_tensor_parallel_ranks() -> None:
    aligned = {name: token_alignment(ActorSettings(fp8=name, tensor_parallel=2)) for name in RECIPES}  # type: ignore[arg-type]
    assert aligned == {"delayed": 32, "tensorwise": 32, "blockwise": 256, "mxfp8": 64}
    assert token_alignment(ActorSettings(tensor_parallel=4)) == 4


def test_an_fp8_run_expects_a_wider_gap_between_engine_and_actor() -> None:
    assert (
        config("actor.fp8=tensorwise").sync.max_logprob_gap == config("rollout.quantization=fp8").sync.max_logprob_gap
    )
    assert (config().sync.max_logprob_gap or 0) < (config("actor.fp8=tensorwise").sync.max_logprob_gap or 0)
    assert config("actor.fp8=tensorwise", "sync.max_logprob_gap=0.02").sync.max_logprob_gap == 0.02


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.sampled_from(["", "+cu130", ".dev0", "rc1"]))
def test_versions_are_read_up_to_their_first_letter(numbers: list[int], tail: str) -> None:
    assert parse_version(".".join(map(str, numbers)) + tail) == tuple(numbers)


def test_a_text_without_a_number_is_no_version() -> None:
    assert parse_version("[N/A]") == ()


def test_preflight_describes_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_coreward.preflight import machine

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 8.9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    versions = {"torch": "2.11.0+cu130", "transformer-engine": "2.11.0"}
    monkeypatch.setattr(machine, "installed", versions.get)
    assert machine.describe(2) == GpuSupport(2, (8, 9), (13, 0), {"transformer-engine": (2, 11, 0)})
    assert machine.describe(0).capability is None
