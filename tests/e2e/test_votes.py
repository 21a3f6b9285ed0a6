"""Votes that end early, on more than is trained on, and further questions for flat ones, on the real stack."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.checkpoint.store import checkpoint_path
from megatron_coreward.report.replay import replay
from megatron_coreward.report.run_record import load_record
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, read_rollouts, rollouts_path
from megatron_coreward.telemetry.timeline import FILE_NAME, read_timeline
from megatron_coreward.trainer.run import train
from tests.e2e.conftest import Task

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ONLY_STEPS = ["validation.at_start=false", "data.val_files=[]"]


def first_step(run_dir: Path, role: str) -> list[ScoredGroup]:
    return [item for item in read_rollouts(rollouts_path(run_dir, 1)) if item.group.role == role]


def test_labels_of_votes_that_end_early_are_those_of_the_full_groups(task: Task) -> None:
    common = [*ONLY_STEPS, "steps=2", "teacher.n=8", "rollout.schedule=streaming"]
    runs = {}
    for early in ("false", "true"):
        changes = [f"run_dir={task.folder / f'early_{early}'}", f"teacher.early_stop={early}", *common]
        runs[early] = train(task.config("co_rewarding_ii", *changes))
    labels = {early: {i.group.uid: i.label for i in first_step(run_dir, "policy")} for early, run_dir in runs.items()}
    assert labels["true"] == labels["false"]
    full, ended = (
        [len(i.group.completions) for i in first_step(runs[early], "teacher")] for early in ("false", "true")
    )
    assert full == [8] * 8
    assert sum(ended) < sum(full)
    row = read_rows(runs["true"] / "metrics.jsonl")[0]
    assert float(row["rollout/teacher_aborted_share"] or 0) == 1 - sum(ended) / 64
    assert 0 < float(row["rollout/aborted_samples"] or 0) <= 64 - sum(ended)  # some may not have begun
    assert replay(load_record(runs["true"])).equal

    steps = read_timeline(runs["true"] / FILE_NAME)
    assert [step.step for step in steps] == [1, 2]
    for step in steps:
        assert {"actors", "driver", "engine 0"} <= step.lanes.keys()
        assert {i.what for i in step.lanes["engine 0"]} >= {"sample policy", "sample teacher", "sync policy"}
        assert "update" in {i.what for i in step.lanes["actors"]}


def test_more_votes_and_further_questions_are_in_the_records_and_in_the_checkpoint(task: Task) -> None:
    changes = ["steps=2", "rollout.votes=6", "rollout.resample_flat=1", *ONLY_STEPS]
    run_dir = train(task.config("majority_voting", f"run_dir={task.folder / 'further'}", *changes))
    groups = first_step(run_dir, "policy")
    assert len({item.group.uid for item in groups}) == 8
    for item in groups:
        assert item.advantages is not None
        assert (len(item.group.completions), int((~np.isnan(item.advantages)).sum())) == (6, 4)
    assert replay(load_record(run_dir)).equal
    drawn = 0
    for row in read_rows(run_dir / "metrics.jsonl"):
        assert 0 <= float(row["rollout/further_questions"] or 0) <= 8
        assert 0 <= float(row["rollout/flat_share"] or 0) <= 1
        drawn += 8 + int(row["rollout/further_questions"] or 0)
    questions = json.loads((checkpoint_path(run_dir, 2) / "trainer.json").read_text())["questions"]
    assert questions["position"] - len(questions["put_off"]) == drawn
