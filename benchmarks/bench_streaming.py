"""What it gains that rollouts do not wait for each other: real runs on responses whose lengths have a long tail.

    python benchmarks/bench_streaming.py [--steps 8] [--json] [--keep FOLDER] [--picture FILE.svg]

The model is that of `long_tailed.py`: 4 layers of 128, lengths from a mixture of two geometric distributions, the
longer one with 20 times the mean, answers that agree in 80% of the cases. 16 questions x 8 rollouts (co_rewarding_i: of
either view; co_rewarding_ii: as many by the teacher) of at most 1,024 tokens, one update of all of them.

deterministic: every engine has its share, the actors wait for the slowest sample, the engines for the actors.
streaming: `rollout.schedule: streaming` with `max_staleness: 1` and `partial: true`.
votes: streaming with `teacher.early_stop`, and with `teacher.engines: 1`.

A speedup is the ratio of the mean times of a step, after two steps and without the last one, which draws nothing ahead.
`speedup_ii` is that of votes, `speedup_ii_streaming` that without. The runs of a method have the same processes: one
actor rank, and one engine (I) or two (II), each with one thread. `teacher_tokens_saved` compares the tokens that the
teacher has drawn, aborted ones included, with those of the deterministic run, which draws all of the same samples.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.long_tailed import write_long_tailed_model
from megatron_coreward.cluster.ray_start import stop_ray
from megatron_coreward.config.load import parse_config
from megatron_coreward.report.timeline import busy_shares, last_steps, picture
from megatron_coreward.telemetry.jsonl import Row, read_rows
from megatron_coreward.telemetry.rollout_dump import dumped_steps, read_rollouts
from megatron_coreward.trainer.run import train

QUESTIONS, SAMPLES, RESPONSE_TOKENS, MEAN_TOKENS, WARMUP = 16, 8, 1024, 12, 2
STREAMING = ["rollout.schedule=streaming", "rollout.max_staleness=1", "rollout.partial=true"]
RUNS: dict[str, tuple[str, int, list[str]]] = {  # name -> method, engines, further settings
    "I deterministic": ("co_rewarding_i", 1, []),
    "I streaming": ("co_rewarding_i", 1, STREAMING),
    "II deterministic": ("co_rewarding_ii", 2, []),
    "II streaming": ("co_rewarding_ii", 2, STREAMING),
    "II votes": ("co_rewarding_ii", 2, [*STREAMING, "teacher.early_stop=true", "teacher.engines=1"]),
}


def write_questions(path: Path, seed: int) -> None:
    """As many questions as two batches have, so that batches differ."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "prompt": [{"role": "user", "content": "".join(map(chr, rng.integers(97, 122, 24)))}],
            "reward_model": {"ground_truth": "7", "style": "rule"},
            "data_source": "bench",
            "ability": "math",
            "extra_info": {"index": i},
        }
        for i in range(2 * QUESTIONS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def run(folder: Path, name: str, steps: int) -> Path:
    """Trains, and returns the run directory."""
    method, engines, changes = RUNS[name]
    run_dir = folder / name.replace(" ", "_")
    config = parse_config(
        {
            "run_dir": str(run_dir),
            "steps": WARMUP + steps + 1,
            "method": method,
            "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
            "data": {
                "train_files": [str(folder / "original.parquet")],
                "rephrased_files": [str(folder / "rephrased.parquet")],
                "batch_size": QUESTIONS,
                "max_prompt_tokens": 64,
                "system_prompt": None,
            },
            "actor": {"tokens_per_microbatch": 8192, "lr": 1e-7},
            "rollout": {
                "n": SAMPLES,
                "num_engines": engines,
                "max_response_tokens": RESPONSE_TOKENS,
                "kv_cache_gib": 0.25,
            },
            "teacher": {"n": SAMPLES},
            "loss": {"mismatch_correction": "tis"},
            "checkpoint": {"resume": "never"},
            "telemetry": {"console": "off"},
        },
        changes,
    )
    train(config)
    return run_dir


def measured(rows: list[Row], steps: int) -> list[Row]:
    """Without the warm-up and the last step."""
    return [row for row in rows if WARMUP < float(row["step"] or 0) <= WARMUP + steps]


def step_seconds(run_dir: Path, steps: int) -> float:
    """Mean seconds of a step."""
    rows = measured(read_rows(run_dir / "metrics.jsonl"), steps)
    return statistics.fmean(float(row["step_time_s"] or 0) for row in rows)


def teacher_tokens(run_dir: Path) -> float:
    """Tokens that the teacher has drawn in the whole run, those of aborted samples included."""
    groups = [item.group for path in dumped_steps(run_dir).values() for item in read_rollouts(path)]
    ended = sum(len(c.token_ids) for group in groups if group.role == "teacher" for c in group.completions)
    aborted = sum(row.get("rollout/aborted_tokens") or 0.0 for row in read_rows(run_dir / "metrics.jsonl"))
    return ended + aborted


def lengths(run_dir: Path) -> dict[str, float]:
    """Of the policy's responses."""
    groups = [item.group for path in dumped_steps(run_dir).values() for item in read_rollouts(path)]
    found = [len(c.token_ids) for group in groups if group.role == "policy" for c in group.completions]
    return {"mean": float(np.mean(found)), **{f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 99, 100)}}


def saved(full: Path, early: Path) -> dict[str, float]:
    """What early votes have spared the teacher, measured and as the run estimates it."""
    estimates = [row.get("rollout/teacher_tokens_saved") for row in read_rows(early / "metrics.jsonl")]
    shares = [row.get("teacher_vote/share") for row in read_rows(full / "metrics.jsonl")]
    return {
        "teacher_tokens_saved": 1.0 - teacher_tokens(early) / teacher_tokens(full),
        "teacher_tokens_saved_estimate": statistics.fmean(e for e in estimates if e is not None),
        "teacher_vote_share": statistics.fmean(share for share in shares if share is not None),
    }


def results(folders: dict[str, Path], steps: int) -> dict[str, Any]:
    """All figures, by the names of the runs."""
    seconds = {name: step_seconds(run_dir, steps) for name, run_dir in folders.items()}
    found: dict[str, Any] = {}
    if "I streaming" in folders:
        found["speedup_i"] = seconds["I deterministic"] / seconds["I streaming"]
    if "II votes" in folders:
        found["speedup_ii"] = seconds["II deterministic"] / seconds["II votes"]
        found["speedup_ii_streaming"] = seconds["II deterministic"] / seconds["II streaming"]
        found |= saved(folders["II deterministic"], folders["II votes"])
    return found | {
        "samples_per_s": {
            name: QUESTIONS * SAMPLES * (2 if RUNS[name][0] == "co_rewarding_i" else 1) / s
            for name, s in seconds.items()
        },
        "step_s": seconds,
        "busy": {name: busy_shares(last_steps(run_dir, steps + 1)[:-1]) for name, run_dir in folders.items()},
        "response_tokens": lengths(next(iter(folders.values()))),
    }


def write_picture(path: Path, folders: dict[str, Path]) -> None:
    """Two steps of the deterministic and of the fastest run of method II, on one page each."""
    for name in ("II deterministic", "II votes"):
        drawn = picture(last_steps(folders[name], 3)[:-1])
        svg = drawn[drawn.index("<svg") : drawn.index("</svg>") + len("</svg>")]
        svg = svg.replace("<svg ", '<svg font-family="sans-serif" font-size="11" ', 1)
        path.with_name(f"{path.stem}_{name.split()[1]}.svg").write_text(svg + "\n")


def show(found: dict[str, Any]) -> None:
    """The figures, for people."""
    tail = found["response_tokens"]
    print(f"response tokens: mean {tail['mean']:.0f}, median {tail['p50']:.0f}, longest {tail['p100']:.0f}")
    for name, seconds in found["step_s"].items():
        busy = ", ".join(f"{lane} {share:.0%}" for lane, share in found["busy"][name].items() if lane != "driver")
        print(f"{name:<18}{seconds:>7.2f} s a step{found['samples_per_s'][name]:>8.1f} samples/s   busy: {busy}")
    for key in ("speedup_i", "speedup_ii_streaming", "speedup_ii"):
        if key in found:
            print(f"{key:<24}{found[key]:.2f}x")
    if "teacher_tokens_saved" in found:
        print(
            f"teacher_tokens_saved    {found['teacher_tokens_saved']:.1%} (the run's own estimate "
            f"{found['teacher_tokens_saved_estimate']:.1%}), at a vote share of {found['teacher_vote_share']:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="that are measured of each run")
    parser.add_argument("--method", choices=("I", "II"), help="only the runs of this one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--keep", type=Path, help="folder for the runs, new or empty")
    parser.add_argument("--picture", type=Path, help="who was busy when, as FILE_deterministic.svg and FILE_votes.svg")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_long_tailed_model(folder / "model", MEAN_TOKENS)
        for seed, name in enumerate(("original", "rephrased")):
            write_questions(folder / f"{name}.parquet", seed)
        folders = {name: run(folder, name, options.steps) for name in RUNS if options.method in (None, name.split()[0])}
        found = results(folders, options.steps)
        if options.picture and "II votes" in folders:
            write_picture(options.picture, folders)
    stop_ray()
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
