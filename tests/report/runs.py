"""Small run directories, written as a run writes them: dumps scored by the real methods, rows, configuration."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.guard import Guard
from megatron_coreward.report.recompute import recompute_step
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.jsonl import JsonlSink
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, dump_rollouts
from megatron_coreward.types import Completion, Prompt, Role, RolloutGroup, TokenStats, View

QUESTIONS = 4
G = 4


def sampled(uid: str, view: View, role: Role, texts: Sequence[str], question: str | None = None) -> RolloutGroup:
    """A group with the given responses, each as many tokens as words; a text in a box or behind #### is its answer."""
    completions = []
    for text in texts:
        length = max(1, len(text.split()))
        _, box, inside = text.rpartition("\\boxed{")
        _, mark, behind = text.rpartition("#### ")
        answer = inside.removesuffix("}") if box else behind if mark else None
        completions.append(
            Completion(
                token_ids=np.arange(length, dtype=np.int32),
                logprobs=np.zeros(length, dtype=np.float32),
                text=text,
                answer=answer,
                finish_reason="stop",
                weight_version=1,
            )
        )
    return RolloutGroup(
        uid, view, role, Prompt(question or f"{view} {uid}?", np.arange(3, dtype=np.int32)), tuple(completions)
    )


def default_texts(step: int, question: int, view: View, role: Role) -> list[str]:
    """Two rollouts with one answer, one with another, one without any."""
    right = f"so it is \\boxed{{{question + step}}}"
    other = f"or rather \\boxed{{{question + (view == 'rephrased') + (role == 'teacher')}}}"
    return [right, right, other, "who knows"]


def write_run(
    run_dir: Path,
    method: str = "co_rewarding_i+ii",
    steps: int = 3,
    texts: Callable[[int, int, View, Role], list[str]] = default_texts,
    config: Mapping[str, Any] | None = None,
    ground_truth: str | None = None,
) -> Path:
    """A run directory with dumps, rows that follow from them, and decisions of the guard."""
    run_dir.mkdir(parents=True)
    tree = {
        "run_dir": str(run_dir),
        "steps": steps,
        "method": method,
        "model": {"hf_path": "models/tiny"},
        **(config or {}),
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    settings = RewardSettings.model_validate(tree.get("rewards") or {})
    guard = Guard(GuardSettings.model_validate(tree.get("guard") or {}))
    sink = JsonlSink(run_dir / "metrics.jsonl")
    sink.write(0, {"step_time_s": 1.0, "val/pass@1": 0.5, "val/avg@8": 0.4})
    with AnswerEquivalence(settings.equivalence) as equivalence:
        for step in range(1, steps + 1):
            scored = judged_step(method, step, texts, settings, equivalence, ground_truth)
            dump_rollouts(run_dir, step, scored)
            row = dict(recompute_step(scored, METHODS[method], settings, equivalence).metrics)
            row |= {"rollout/entropy": 0.5, "loss/kl": 0.01 * step, "teacher/decay": 0.99}
            row |= guard.observe(step, row).metrics()
            row |= {"time/rollout_s": 1.0, "time/update_s": 2.0, "time/outside_s": 0.1, "step_time_s": 3.1}
            sink.write(step, row | {"val/avg@8": 0.4 + 0.1 * step})
    sink.close()
    return run_dir


def judged_step(
    method: str,
    step: int,
    texts: Callable[[int, int, View, Role], list[str]],
    settings: RewardSettings,
    equivalence: AnswerEquivalence,
    ground_truth: str | None = None,
) -> list[ScoredGroup]:
    """A step's groups with what the method makes of them."""
    needs = METHODS[method].needs
    roles: tuple[Role, ...] = ("policy", "teacher") if needs.teacher else ("policy",)
    groups: dict[Role, list[RolloutGroup]] = {
        role: [
            sampled(f"set/{question}", view, role, texts(step, question, view, role))
            for question in range(QUESTIONS)
            for view in needs.sampled_views(role)
        ]
        for role in roles
    }
    lengths = [len(c.token_ids) for group in groups["policy"] for c in group.completions]
    values = [np.full(length, place % 3, dtype=np.float32) for place, length in enumerate(lengths)]
    context = BatchRewardContext(
        needs,
        equivalence,
        policy_groups=groups["policy"],
        teacher_groups=groups.get("teacher", []),
        token_stats=TokenStats(values, values, values) if needs.token_stats else None,
        ground_truths={f"set/{question}": str(question + step) for question in range(QUESTIONS)},
        min_margin=settings.min_margin,
    )
    scored = []
    for group in groups["policy"]:
        group_reward = METHODS[method].score(group, context)
        advantages = group_reward.advantages_of_group()
        scored.append(ScoredGroup(group, group_reward.label, group_reward.rewards, advantages, ground_truth))
    return scored + [ScoredGroup(group, None, None, None, ground_truth) for group in groups.get("teacher", [])]
