"""A real run that the guard stops goes back to an older checkpoint with a heavier KL term, and then gives up."""

import json
from pathlib import Path

import pytest

from megatron_coreward.checkpoint.store import saved_steps
from megatron_coreward.errors import RunError
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.trainer.rollback import FILE_NAME
from megatron_coreward.trainer.run import train
from tests.e2e.conftest import Task

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(600)]

# Limits so tight that the second step shows two indicators: any KL at all, and as many rollouts cut off as before.
HAIR_TRIGGER = (
    "guard.warmup=1",
    "guard.window=1",
    "guard.warn_after=1",
    "guard.act_after=1",
    "guard.kl=1e-12",
    "guard.no_answer_rise=0",
    "guard.truncated_rise=0",
    "guard.length_fall=0",
    "guard.agreement_fall=0",
)


def test_a_run_goes_back_once_and_ends_when_that_was_not_enough(task: Task) -> None:
    run_dir: Path = task.folder / "guarded"
    config = task.config(
        "majority_voting",
        f"run_dir={run_dir}",
        "steps=4",
        "checkpoint.every=1",
        "guard.action=rollback",
        "guard.max_actions=1",
        *HAIR_TRIGGER,
    )
    with pytest.raises(RunError, match=r"training may be collapsing.*KL to the reference.*Action: stop"):
        train(config)
    rows = {int(row["step"]): row for row in read_rows(run_dir / "metrics.jsonl") if row["step"]}
    went = json.loads((run_dir / FILE_NAME).read_text())
    assert went["to"] == went["from"] - 1
    assert went["from"] in rows
    assert rows[went["to"]]["loss/kl_coef"] == pytest.approx(config.loss.kl_coef)
    assert rows[went["from"]]["loss/kl_coef"] == pytest.approx(3 * (config.loss.kl_coef or 0))
    assert max(saved_steps(run_dir)) == went["to"]
    events = (run_dir / "events.log").read_text()
    assert f"Going on from step {went['to']}" in events
    assert not (run_dir / "hf").exists()
