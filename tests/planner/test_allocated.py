"""Predicted bytes are the allocated ones: weights, gradients, optimizer, teacher and copies of real actors, exactly."""

from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.planner.hardware import Assumptions
from megatron_coreward.planner.memory import actor_memory
from megatron_coreward.planner.parameters import stage_parameters
from megatron_coreward.weights.layouts import ActorLayout
from tests.actor.ranks import free_port, run_ranks
from tests.planner.on_ranks import allocated

pytestmark = pytest.mark.ranks

# Sizes that leave padding at every place where there can be some: 259 tokens, heads of 24, odd layer counts.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2 tied": {"family": "qwen2", "tie": True},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "llama": {"family": "llama"},
    "qwen3_moe": {"family": "qwen3_moe"},
}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
VPP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
DP2 = {"data_parallel": 2}
EP2 = {"data_parallel": 2, "expert_parallel": 2}

Case = tuple[str, str, dict[str, Any]]
TWO: list[Case] = [
    ("qwen2 tied", "bfloat16", PP2),
    ("qwen3", "bfloat16", DP2),
    ("llama", "float32", TP2),
    ("qwen3_moe", "bfloat16", EP2),
]
MORE: list[Case] = [
    (model, dtype, layout)
    for model in MODELS
    for dtype in ("bfloat16", "float32")
    for layout in (TP2, PP2, VPP2, DP2)
    if (model, dtype, layout) not in TWO
]
MORE += [
    ("qwen3", "bfloat16", {**PP2, "first_stage_layers": 3, "last_stage_layers": 1}),
    ("qwen3_moe", "bfloat16", {**TP2, "expert_tensor_parallel": 1}),
    ("qwen3_moe", "bfloat16", {**TP2, "expert_tensor_parallel": 1, "expert_parallel": 2}),
]
FOUR: list[Case] = [
    ("qwen3_moe", "bfloat16", {**TP2, "data_parallel": 2, "expert_tensor_parallel": 1, "expert_parallel": 2}),
    ("qwen2 tied", "bfloat16", {**TP2, **PP2}),
    ("qwen3", "bfloat16", {**TP2, **DP2}),
    ("llama", "bfloat16", {**VPP2, **DP2}),
    ("qwen3", "float32", {"data_parallel": 4}),
    ("qwen3_moe", "bfloat16", {**TP2, **EP2}),
    ("qwen3_moe", "bfloat16", {**PP2, **EP2}),
    ("qwen3_moe", "bfloat16", {"data_parallel": 4, "expert_parallel": 2}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, changes in MODELS.items():
        write_model(folder / name, byte_level_tokenizer(), hidden=64, ffn=96, **changes)
    return {name: folder / name for name in MODELS}


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, TWO),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks, every family", "4 ranks"],
)
def test_predicted_bytes_are_the_allocated_ones(models: dict[str, Path], ranks: int, cases: list[Case]) -> None:
    wanted = [(models[model], dtype, layout) for model, dtype, layout in cases]
    results = run_ranks(ranks, allocated, wanted, [free_port() for _ in wanted], timeout_s=900)
    for place, (path, dtype, settings) in enumerate(wanted):
        arch, layout = read_architecture(path), ActorLayout.of(ActorSettings(**settings))
        item = 2 if dtype == "bfloat16" else 4
        of_stage: dict[int, list[dict[str, int]]] = {}
        for pp, dp, expert_dp, found in (of_rank[place] for of_rank in results):
            held = stage_parameters(arch, layout, pp)
            owned = held.dense_owned[dp] + held.expert_owned[expert_dp]
            assert found == {
                "weights": item * held.numel,
                "gradients": 4 * held.numel,
                "main": 4 * owned if item == 2 else 0,  # in fp32, views of the weights
                "moments": 8 * owned,
                "teacher": 8 * owned,
                "teacher_model": item * held.numel,
                "reference_model": item * held.numel,
            }, (cases[place], pp, dp)
            of_stage.setdefault(pp, []).append(found)
        for stage in actor_memory(config(path, dtype, settings), arch, Assumptions()):
            ranks_of_stage = of_stage[stage.stage]
            for part, names in {
                "weights": ["weights"],
                "gradients": ["gradients"],
                "optimizer": ["main", "moments"],
                "teacher": ["teacher", "teacher_model"],
            }.items():
                fullest = max(sum(found[name] for name in names) for found in ranks_of_stage)
                assert stage.static[part] == fullest, (cases[place], part)


def config(path: Path, dtype: str, layout: dict[str, Any]) -> Any:
    return parse_config(
        {
            "run_dir": "run",
            "steps": 1,
            "method": "co_rewarding_ii",
            "model": {"hf_path": str(path), "dtype": dtype},
            "data": {"train_files": ["a"]},
            "actor": layout,
        }
    )
