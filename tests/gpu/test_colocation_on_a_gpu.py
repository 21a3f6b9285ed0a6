"""Memory that is given away is really free, and weights cross between processes on one card."""

from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.config.load import parse_config
from tests.actor.ranks import free_port, run_ranks
from tests.gpu.actors import make_batch, take_turns
from tests.gpu.test_transformer_engine import vocabulary


def test_an_actor_that_stands_back_holds_less_by_all_of_its_state(model: Path) -> None:
    (found,) = run_ranks(1, take_turns, model, free_port(), make_batch(vocabulary(model)))
    before, away, after = found["held"]
    assert before - away >= found["state"]
    assert found["freed"] >= 0.5 * found["state"]  # only segments in which nothing is left go back to the driver
    assert after == pytest.approx(before, rel=0.01)
    first, second = found["reports"]
    assert second["grad_norm"] != first["grad_norm"]  # the update before the switch was kept


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.parametrize("transport", ["ipc", "shared_memory", "gloo"])
def test_every_block_arrives_and_the_engine_computes_what_the_actor_computes(
    model: Path, tmp_path: Path, transport: str
) -> None:
    """`verify_sync` compares checksums of all blocks, the log-probs of a probe, and asks for unpublished weights."""
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.cluster.verify_sync import verify_sync

    checks = list(verify_sync(settings(model, tmp_path, f"sync.transport={transport}")))
    stop_ray()
    assert [check.role for check in checks] == ["policy", "teacher"] * 2
    assert max(check.canary_gap for check in checks) < 0.05  # nats, of two implementations in BF16


@pytest.mark.ray
@pytest.mark.engine
def test_fp8_rollouts_stay_near_the_actor(model: Path, tmp_path: Path) -> None:
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.cluster.verify_sync import verify_sync
    from megatron_coreward.config.accelerator import FP8_LOGPROB_GAP

    checks = list(verify_sync(settings(model, tmp_path, "rollout.quantization=fp8"), rounds=1))
    stop_ray()
    assert all(check.canary_gap < FP8_LOGPROB_GAP for check in checks)


def settings(model: Path, folder: Path, *overrides: str) -> Any:
    from megatron_coreward.demo.task import make_splits, write_parquet

    folder.mkdir(parents=True, exist_ok=True)
    files = write_parquet(folder, make_splits(1, num_train=128, num_heldout=16, num_sft=0))
    tree = {
        "run_dir": str(folder / "run"),
        "steps": 20,
        "method": "co_rewarding_ii",
        "model": {"hf_path": str(model)},
        "data": {
            "train_files": [str(files.train)],
            "rephrased_files": [str(files.train_rephrased)],
            "batch_size": 8,
            "max_prompt_tokens": 64,
            "system_prompt": None,
        },
        "actor": {"backend": "te", "tokens_per_microbatch": 4096},
        "rollout": {"placement": "colocated", "n": 4, "max_response_tokens": 32, "gpu_memory_utilization": 0.3},
        "teacher": {"n": 4},
        "validation": {"every": 0, "at_start": False},
        "telemetry": {"console": "off"},
    }
    return parse_config(tree, overrides)
