"""What it gains to let work go ahead of the step that needs it: rollouts one step early, a teacher that labels early.

    python benchmarks/bench_ahead.py [--steps 12] [--rounds 2]

Real runs of Co-rewarding-II on a tiny Qwen3 (4 layers of 128, random weights; 32 prompts x 8 rollouts of 64 tokens by
the policy and as many by the teacher), one actor rank and one engine, a core each. Settings alternate, `rounds` times.
A figure is the mean time of a step after the first two, over whole windows of labels. Ratios are to a run in which
nothing goes ahead, of the same round; medians over rounds are printed.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.load import parse_config
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.trainer.run import train

PROMPTS, SAMPLES, RESPONSE_TOKENS, WARMUP, WINDOW = 32, 8, 64, 2, 4
SETTINGS = {
    "nothing ahead": [],
    "teacher.lookahead=3": ["teacher.lookahead=3"],
    "rollout.max_staleness=1": ["rollout.max_staleness=1", "loss.mismatch_correction=tis"],
    "both": ["teacher.lookahead=3", "rollout.max_staleness=1", "loss.mismatch_correction=tis"],
}


def write_questions(path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": "".join(map(chr, rng.integers(97, 122, 24)))}],
            "reward_model": {"ground_truth": "1", "style": "rule"},
            "data_source": "bench",
            "ability": "math",
            "extra_info": {"index": i},
        }
        for i in range(PROMPTS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def step_seconds(folder: Path, name: str, changes: list[str], steps: int) -> float:
    """Mean seconds of a step after the warm-up, over whole windows of labels."""
    run_dir = folder / name.replace(" ", "_").replace("=", "_")
    config = parse_config(
        {
            "run_dir": str(run_dir),
            "steps": WARMUP + steps,
            "method": "co_rewarding_ii",
            "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
            "data": {
                "train_files": [str(folder / "questions.parquet")],
                "batch_size": PROMPTS,
                "max_prompt_tokens": 64,
                "system_prompt": None,
            },
            "actor": {"tokens_per_microbatch": 8192},
            "rollout": {"n": SAMPLES, "max_response_tokens": RESPONSE_TOKENS, "kv_cache_gib": 0.25},
            "teacher": {"n": SAMPLES},
            "checkpoint": {"resume": "never"},
            "telemetry": {"console": "off", "dump_rollouts": False},
        },
        changes,
    )
    train(config)
    rows = read_rows(run_dir / "metrics.jsonl")
    seconds = [float(row["step_time_s"]) for row in rows if float(row["step"]) > WARMUP]
    return statistics.fmean(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help=f"a multiple of {WINDOW}")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in SETTINGS}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model", byte_level_tokenizer())
        write_questions(folder / "questions.parquet")
        for number in range(options.rounds):
            for name, changes in SETTINGS.items():
                seconds[name].append(step_seconds(folder, f"{name} {number}", changes, options.steps))
                ratios[name].append(seconds["nothing ahead"][-1] / seconds[name][-1])
    stop_ray()
    print(f"{'':<16}{'s a step':>10}{'faster':>10}")
    for name in SETTINGS:
        print(f"{name:<16}{statistics.median(seconds[name]):>10.2f}{statistics.median(ratios[name]):>9.2f}x")


if __name__ == "__main__":
    main()
