"""Streamed rollouts on the real stack: staleness, partial rollouts, a teacher with engines of its own, a death."""

import time
from pathlib import Path

import pytest

from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, read_rollouts, rollouts_path
from megatron_coreward.trainer.run import train
from megatron_coreward.types import WeightVersion
from tests.e2e.conftest import Task
from tools.soak import QUESTIONS, Attempt, digest, last_step, streaming_problems

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

STREAM = ("rollout.schedule=streaming", "loss.mismatch_correction=tis", "rollout.num_engines=2")
AHEAD = ("rollout.max_staleness=2", "rollout.partial=true")
BATCH = 8


def scored(run_dir: Path, step: int) -> list[ScoredGroup]:
    return read_rollouts(rollouts_path(run_dir, step))


def test_partial_rollouts_two_steps_ahead_outlive_an_engine(task: Task) -> None:
    """Over the border of an epoch, with checkpoints and a validation in between."""
    # So few at once that responses are under way when weights change, and enough that engines get two steps ahead.
    options = (
        "steps=10",
        "checkpoint.every=4",
        "validation.every=5",
        "telemetry.console=plain",
        "rollout.max_num_seqs=8",
    )
    config = task.config("co_rewarding_i", f"run_dir={task.folder / 'streamed'}", *STREAM, *AHEAD, *options)
    attempt = Attempt.start(config)
    try:
        begin = time.monotonic()
        while last_step(config.run_dir) < 2 and time.monotonic() - begin < 300:
            assert attempt.process.poll() is None, attempt.wait()[1]
            time.sleep(0.2)
        attempt.victims("engine")[0].kill()
        status, output = attempt.wait()
    finally:
        attempt.end()
    assert status == 0, output
    events = (config.run_dir / "events.log").read_text()
    assert events.count("starting it again") == 1
    assert [*streaming_problems(config, QUESTIONS)] == []
    rows = read_rows(config.run_dir / "metrics.jsonl")[1:]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert max(float(row["rollout/staleness_max"]) for row in rows) == 2
    assert max(float(row["rollout/continued_share"]) for row in rows) > 0
    gaps = [float(row["sync/canary_gap"]) for row in rows if "sync/canary_gap" in row]
    assert len(gaps) >= 8  # nothing is left to draw from the weights of the last steps
    assert max(gaps) < 1e-3


def test_a_teacher_with_an_engine_of_its_own_labels_while_the_policy_samples(task: Task) -> None:
    options = ("steps=5", "teacher.engines=1", "checkpoint.every=2")
    config = task.config("co_rewarding_ii", f"run_dir={task.folder / 'beside'}", *STREAM, *AHEAD, *options)
    run_dir = train(config)
    assert [*streaming_problems(config, QUESTIONS)] == []
    for step in range(1, 6):
        teacher = [item.group for item in scored(run_dir, step) if item.rewards is None]
        assert len(teacher) == BATCH
        completions = [c for group in teacher for c in group.completions]
        assert {WeightVersion.of(int(v)).role for c in completions for v in c.token_versions} == {"teacher"}
        assert {len(c.logprobs) for c in completions} == {0}


def test_a_deterministic_run_is_the_same_if_the_teacher_has_an_engine_of_its_own(task: Task) -> None:
    """Each engine then draws what one engine drew for both, in the same batches."""
    alone = train(task.config("co_rewarding_ii", f"run_dir={task.folder / 'one'}", "steps=2"))
    own = ("rollout.num_engines=2", "teacher.engines=1")
    beside = train(task.config("co_rewarding_ii", f"run_dir={task.folder / 'two'}", "steps=2", *own))
    assert digest(beside) == digest(alone)


def test_a_streaming_run_without_staleness_learns_from_the_weights_of_the_moment(task: Task) -> None:
    config = task.config("co_rewarding_ii", f"run_dir={task.folder / 'in time'}", "rollout.schedule=streaming")
    run_dir = train(config)
    assert [*streaming_problems(config, QUESTIONS)] == []
    rows = read_rows(run_dir / "metrics.jsonl")[1:]
    assert all(float(row["sync/logprob_gap_max"]) < 1e-3 for row in rows)
