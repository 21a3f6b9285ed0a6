"""The GPU benchmark's plan and table, as far as they need no GPU."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.planner.models import published_architecture

TOOL = Path(__file__).parents[2] / "tools" / "bench_gpu.py"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_names_every_run_and_needs_no_gpu(tool: Any) -> None:
    done = subprocess.run([sys.executable, TOOL, "--dry-run"], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert [line[:28].strip() for line in lines] == [run.name for run in tool.runs()]
    assert all("fits" in line for line in lines)
    assert {run.group for run in tool.runs()} == {"actor", "rollout", "train"}


def test_a_dry_run_says_what_does_not_fit(tool: Any) -> None:
    graded_answers = dict(line.split("  ", 1) for line in tool.dry_run("Qwen3-14B"))
    assert "of 140 GiB: actor, stage 0: needs" in graded_answers["actor bf16"]
    four = dict(line.split("  ", 1) for line in tool.dry_run("Qwen3-4B-Base"))
    assert "fits" not in four["actor bf16"]  # 110 GiB of state, and what a micro-batch takes
    assert "fits" in graded_answers["rollout bf16"]


@pytest.mark.parametrize("shape", ["Qwen3-1.7B-Base", "Qwen2.5-3B", "Llama-3.2-3B-Instruct", "Qwen3-4B-Base"])
@pytest.mark.parametrize("microbatch", [16384, 4096])
def test_what_fits_is_within_the_card_and_what_does_not_is_beyond(tool: Any, shape: str, microbatch: int) -> None:
    for line in tool.dry_run(shape, microbatch):
        found = re.search(r"(fits, )?(\d+) of (\d+) GiB", line)
        assert found is not None
        assert (int(found[2]) <= int(found[3])) == bool(found[1]), line


def test_smaller_micro_batches_make_larger_shapes_fit(tool: Any) -> None:
    def fitting(microbatch: int) -> set[str]:
        return {line[:28].strip() for line in tool.dry_run("Qwen2.5-3B", microbatch) if "fits" in line}

    assert "train co_rewarding_ii bf16" in fitting(4096) - fitting(16384)
    four = [line for line in tool.dry_run("Qwen3-4B-Base", 4096) if "fits" not in line]
    assert [line[:28].strip() for line in four] == ["train co_rewarding_ii fp8"]  # as docs/gpu.md says
    words = [sys.executable, TOOL, "--dry-run", "--shape", "Qwen2.5-3B", "--tokens-per-microbatch"]
    done = subprocess.run([*words, "4096"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == list(tool.dry_run("Qwen2.5-3B", 4096))
    short = subprocess.run([*words, "1023"], capture_output=True, text=True, timeout=60, check=False)
    assert (short.returncode, "1024 or more" in short.stderr) == (2, True)


def test_flops_of_an_update_are_six_a_weight_and_token_and_the_attention(tool: Any) -> None:
    arch = published_architecture("Qwen3-1.7B-Base")
    weights = 28 * (2048 * (2 * 16 + 2 * 8) * 128 + 3 * 2048 * 6144) + 151936 * 2048
    attention = 28 * 12 * 16 * 128 * 512  # of 1,024 tokens a token sees 512 in the mean
    assert tool.update_flops(arch, 1024, 10) == pytest.approx(10 * (6 * weights + attention))


def test_the_model_is_loadable_and_has_the_published_shape(tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from megatron_coreward.checkpoint.safetensors_files import HfWeights
    from megatron_coreward.config.architecture import read_architecture
    from megatron_coreward.preflight.tokenizer import FileTokenizer

    small = {**tool.CONFIGS["Qwen3-1.7B-Base"], "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512}
    small |= {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    monkeypatch.setitem(tool.CONFIGS, "small", small)
    tool.write_random_model(tmp_path, "small", device="cpu")
    arch = read_architecture(tmp_path)
    assert arch == published_architecture("small")
    weights = HfWeights(tmp_path)
    weights.check(arch)
    weights.close()
    assert FileTokenizer(tmp_path).num_ids <= arch.vocab_size


def rows(outside: float = 0.01) -> list[dict[str, float]]:
    return [
        {
            "step": float(step),
            "step_time_s": 2.0 if step > 5 else 60.0,
            "time/sync_s": 0.4,
            "time/switch_s": 0.2,
            "time/rollout_s": 1.0,
            "time/outside_s": 2 * outside,
            "time/outside_share": outside,
            "sync/logprob_gap": 0.01,
        }
        for step in range(1, 21)
    ]


def result(run: str, figures: dict[str, Any], shape: str) -> dict[str, Any]:
    versions = {"torch": "2.11.0", "vllm": "0.26.0"}
    about = {
        "shape": shape,
        "tokens_per_microbatch": 16384,
        "gpu": "a GPU",
        "driver": "1",
        "versions": versions,
        "command": "python x",
    }
    return {"run": run, "figures": figures, **about}


def test_figures_of_a_run_leave_the_first_steps_out(tool: Any, tmp_path: Path) -> None:
    arch = published_architecture("Qwen3-1.7B-Base")
    run = next(run for run in tool.runs() if run.name == "train co_rewarding_ii bf16")
    figures = tool.figures_of_run(rows(), arch, tool.config_of(run, tmp_path, tmp_path))
    assert figures["step_s"] == 2.0
    assert figures["sync_s"] == pytest.approx(0.2)  # two publications a step
    assert figures["sync_gb_s"] == pytest.approx(2 * 1.72e9 / 1e9 / 0.2, rel=0.01)
    assert figures["shares"]["rollout"] == pytest.approx(0.5)


def test_the_table_has_every_figure_with_its_aim_and_says_what_was_not_measured(tool: Any, tmp_path: Path) -> None:
    figures = {
        "actor bf16": {"update_tokens_s": 1000.0, "mfu_of_bf16_peak": 0.46, "peak_gib": 60.0},
        "actor fp8 tensorwise": {"update_tokens_s": 1200.0, "mfu_of_bf16_peak": 0.5, "peak_gib": 60.0},
    }
    results = [result(run, found, "Qwen3-4B-Base") for run, found in figures.items()]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in results))
    printed = subprocess.run(
        [sys.executable, TOOL, "--table", file], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "| update, BF16, share of the BF16 peak (MFU) | 0.460 | ≥ 0.45 | yes |" in printed
    assert "| update, FP8 tensorwise, over BF16 | 1.20 | ≥ 1.3 | no |" in printed
    assert "| rollout, BF16, over bare vLLM | not measured | ≥ 0.95 |  |" in printed
    assert "torch 2.11.0, vllm 0.26.0" in printed


def test_an_aim_is_that_of_the_shapes_it_was_set_for(tool: Any) -> None:
    """docs/gpu.md: a weight sync of 0.3 s for 8B, FP8 over BF16 from 4B up."""
    page = (TOOL.parents[1] / "docs" / "gpu.md").read_text()
    assert "| ≤ 0.3 s, for 8B |" in page
    assert "| ≥ 1.3 from 4B up |" in page
    for shape, sync, fp8 in (
        ("Qwen3-1.7B-Base", False, False),
        ("Qwen3-4B-Base", False, True),
        ("Qwen2.5-7B", False, True),
        ("Qwen3-8B-Base", True, True),
        ("Qwen3-14B", False, True),
    ):
        table = tool.table([], shape)
        assert ("sync, s each | not measured | ≤ 0.3 |" in table) == sync
        assert ("FP8 tensorwise, over BF16 | not measured | ≥ 1.3 |" in table) == fp8


def test_shapes_are_not_mixed_in_a_table(tool: Any) -> None:
    rates = (("Qwen3-4B-Base", "rollout bare", 50.0), ("Qwen3-8B-Base", "rollout bf16", 100.0))
    results = [result(run, {"rollout_tokens_s": rate}, shape) for shape, run, rate in rates]
    printed = tool.table(results)
    assert printed.count("| rollout, BF16, over bare vLLM | not measured |") == 2
    assert [line.split(" | ")[0] for line in printed.splitlines() if "| value | aim |" in line] == [
        "| Qwen3-4B-Base, micro-batches of 16,384 tokens",
        "| Qwen3-8B-Base, micro-batches of 16,384 tokens",
    ]


def test_sizes_of_micro_batches_are_not_mixed_in_a_table(tool: Any) -> None:
    rates = (("actor bf16", 1000.0, 4096), ("actor fp8 tensorwise", 1400.0, 16384))
    figures = {"mfu_of_bf16_peak": 0.4, "peak_gib": 1.0}
    results = [
        result(run, figures | {"update_tokens_s": rate}, "Qwen3-4B-Base") | {"tokens_per_microbatch": size}
        for run, rate, size in rates
    ]
    assert tool.table(results).count("FP8 tensorwise, over BF16 | not measured") == 2
