"""Rollouts and labels that go ahead, on the real stack: right weights, and a run that was cut off repeats them."""

import shutil

import pytest

from megatron_coreward.checkpoint.store import checkpoint_path
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.rollout_dump import read_rollouts, rollouts_path
from megatron_coreward.trainer.run import train
from tests.e2e.conftest import Task
from tools.soak import comparable_rows, digest

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(600)]


def test_a_run_with_lags_resumes_to_the_same_weights(task: Task) -> None:
    ahead = [
        "rollout.max_staleness=1",
        "loss.mismatch_correction=tis",
        "teacher.lookahead=1",
        "steps=4",
        "checkpoint.every=2",
    ]
    config = task.config("co_rewarding_ii", f"run_dir={task.folder / 'ahead'}", *ahead)
    run_dir = train(config)
    rows = read_rows(run_dir / "metrics.jsonl")[1:]
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 0, 1]
    for step in (1, 2, 3, 4):
        groups = [item.group for item in read_rollouts(rollouts_path(run_dir, step))]
        versions = {(group.role, c.weight_version) for group in groups for c in group.completions}
        window = (step - 1) // 2 * 2  # updates when the window of labels began
        assert versions == {("teacher", 2 * window + 1), ("policy", 2 * (window if step % 2 == 0 else step - 1))}

    expected_weights, expected_rows = digest(run_dir), comparable_rows(run_dir)
    shutil.rmtree(checkpoint_path(run_dir, 4))
    shutil.rmtree(run_dir / "hf")
    rollouts_path(run_dir, 4).unlink()  # as if it had died before the last step's rollouts were complete
    assert train(config) == run_dir
    assert digest(run_dir) == expected_weights
    assert comparable_rows(run_dir) == expected_rows
