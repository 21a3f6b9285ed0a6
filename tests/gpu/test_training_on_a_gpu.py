"""Twenty steps of both instantiations, in BF16 and FP8: nothing is infinite, engine and actor agree all along."""

import math
from pathlib import Path

import pytest

from megatron_coreward.config.accelerator import FP8_LOGPROB_GAP
from tests.gpu.test_colocation_on_a_gpu import settings

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.e2e]

PRECISIONS = {
    "bf16": ([], 0.05),
    "fp8": (["actor.fp8=tensorwise"], FP8_LOGPROB_GAP),
    "fp8 weights, state at rest on the host": (
        ["actor.fp8=tensorwise", "actor.fp8_params=true", "actor.offload_optimizer=true", "actor.offload_teacher=true"],
        FP8_LOGPROB_GAP,
    ),
}


@pytest.mark.parametrize("method", ["co_rewarding_i", "co_rewarding_ii"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_steps(model: Path, tmp_path: Path, method: str, precision: str) -> None:
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.telemetry.jsonl import read_rows
    from megatron_coreward.trainer.run import train

    overrides, gap = PRECISIONS[precision]
    config = settings(model, tmp_path, f"method={method}", *overrides)
    try:
        train(config)
    finally:
        stop_ray()
    rows = list(read_rows(config.run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row in rows:
        assert all(math.isfinite(float(row[key])) for key in ("loss/total", "optim/grad_norm"))
        assert float(row["sync/canary_gap"]) < gap
        assert float(row["time/switch_s"]) > 0
    assert (config.run_dir / "hf" / "config.json").is_file()


def test_a_resumed_fp8_run_goes_on(model: Path, tmp_path: Path) -> None:
    """Its checkpoint holds no pickle of Transformer Engine, and the scales are found again."""
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.telemetry.jsonl import read_rows
    from megatron_coreward.trainer.run import train

    for recipe in ("tensorwise", "delayed"):
        for steps in (2, 4):
            config = settings(model, tmp_path / recipe, f"actor.fp8={recipe}", f"steps={steps}", "checkpoint.every=2")
            try:
                train(config)
            finally:
                stop_ray()
        rows = list(read_rows(config.run_dir / "metrics.jsonl"))
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(math.isfinite(float(row["loss/total"])) for row in rows)
