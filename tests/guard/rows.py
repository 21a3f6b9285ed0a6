"""Rows of label telemetry for the guard's tests: a steady policy, changed where a test says so; and recorded runs."""

import json
from pathlib import Path
from typing import Any

from megatron_coreward.telemetry.jsonl import Row

RECORDED = Path(__file__).with_name("recorded")

STEADY: dict[str, float] = {
    "vote/share": 0.6,
    "vote/distinct_answers": 3.0,
    "vote/no_answer_rate": 0.01,
    "vote/entropy": 0.4,
    "vote/label_variety": 0.9,
    "advantage/zero_variance_share": 0.2,
    "rollout/response_tokens_mean": 200.0,
    "rollout/truncated_share": 0.02,
    "rollout/repeated_ngrams": 0.05,
    "rollout/entropy": 0.5,
    "loss/kl": 0.01,
    "label/teacher_agreement": 0.8,
    "label/view_agreement": 0.7,
    "label/flip_rate": 0.2,
    "anchor/kept": 1.0,
    "anchor/questions": 64.0,
}
# Each sign by itself, far beyond its limit.
SIGNS: dict[str, dict[str, float]] = {
    "consensus": {"vote/share": 0.98, "vote/distinct_answers": 1.1, "label/flip_rate": 0.05},
    "entropy_fall": {"rollout/entropy": 0.01},
    "kl": {"loss/kl": 5.0},
    "entropy_rise": {"rollout/entropy": 5.0},
    "length": {"rollout/response_tokens_mean": 20.0},
    "variety": {"vote/label_variety": 0.05},
    "no_answer": {"vote/no_answer_rate": 0.6},
    "truncated": {"rollout/truncated_share": 0.7},
    "agreement": {"label/view_agreement": 0.1},
    "label_flips": {"label/flip_rate": 0.9},
    "vote_entropy": {"vote/entropy": 0.02},
    "saturation": {"advantage/zero_variance_share": 0.95},
    "locking": {"label/flip_rate": 0.01},
    "anchors": {"anchor/kept": 0.6},
    "repetition": {"rollout/repeated_ngrams": 0.5},
}
CHANGE = ("consensus", "entropy_fall", "kl", "vote_entropy", "saturation", "locking")  # learning shows them too
DAMAGE = tuple(name for name in SIGNS if name not in CHANGE)


def row(step: int, *indicators: str) -> Row:
    """A step of the steady policy with some indicators of collapse."""
    values: Row = {"step": step, **STEADY}
    for indicator in indicators:
        values |= SIGNS[indicator]
    return values


def recorded(name: str) -> tuple[str, list[Row]]:
    """What a recorded run was, and its rows of training steps."""
    table: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    about = table.pop("about")
    columns = [key for key in table if key != "step"]
    rows = [
        {"step": step, **{key: table[key][place] for key in columns if table[key][place] is not None}}
        for place, step in enumerate(table["step"])
    ]
    return about, [row for row in rows if row["step"] != 0]
