"""Flips are counted against the last label of the same question and view, over a kill and a resume as well."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.telemetry.label_history import LabelHistory
from megatron_coreward.telemetry.rollout_dump import ScoredGroup
from megatron_coreward.types import Completion, Prompt, Role, RolloutGroup, View


def scored(uid: str, label: str | None, view: View = "original", role: Role = "policy") -> ScoredGroup:
    tokens = np.zeros(1, dtype=np.int32)
    completion = Completion(tokens, np.zeros(1, dtype=np.float32), "", None, "stop", 0)
    values = np.zeros(1, dtype=np.float32) if role == "policy" else None
    return ScoredGroup(RolloutGroup(uid, view, role, Prompt("", tokens), (completion,)), label, values, values)


def open_history(path: Path, first_step: int = 0) -> LabelHistory:
    return LabelHistory(path, AnswerEquivalence("math", symbolic=False).equivalent, first_step)


def test_a_flip_is_another_answer_than_the_last_one_in_the_same_view(tmp_path: Path) -> None:
    with open_history(tmp_path / "labels.jsonl") as history:
        assert history.observe(1, [scored("a", "1"), scored("b", "2")]) == {"label/seen_before_share": 0}
        metrics = history.observe(
            2, [scored("a", "1.0"), scored("b", "3"), scored("c", "4"), scored("b", "2", "rephrased")]
        )
        assert metrics == {"label/seen_before_share": 2 / 4, "label/flip_rate": 1 / 2}
        assert history.observe(3, [scored("b", "3")])["label/flip_rate"] == 0


def test_a_line_says_which_share_gives_a_label_and_whether_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with open_history(path) as history:
        history.observe(1, [scored("a", "1"), replace(scored("b", "0.5"), ground_truth="1/2")])
    assert json.loads(path.read_text())["labels"] == [
        ["a", "original", "1", 0.0, None],
        ["b", "original", "0.5", 0.0, True],
    ]


def test_the_share_of_a_label_is_that_of_the_rollouts_that_give_it_whatever_they_are_rewarded(tmp_path: Path) -> None:
    path, item = tmp_path / "labels.jsonl", scored("a", "1/2")
    answers = ["0.5", "1/2", "7", None]
    rollouts = tuple(replace(item.group.completions[0], answer=answer) for answer in answers)
    rewards = np.array([0.25, -0.25, 0.25, 1.0], dtype=np.float32)  # as of RESTRAIN, SCRL or a mixture
    with open_history(path) as history:
        history.observe(1, [ScoredGroup(replace(item.group, completions=rollouts), "1/2", rewards, rewards)])
    assert json.loads(path.read_text())["labels"] == [["a", "original", "1/2", 0.5, None]]


def test_missing_labels_and_the_teacher_s_groups_do_not_count(tmp_path: Path) -> None:
    with open_history(tmp_path / "labels.jsonl") as history:
        history.observe(1, [scored("a", "1")])
        assert history.observe(2, [scored("a", None), scored("a", "9", role="teacher")]) == {}
        assert history.observe(3, [scored("a", "2")]) == {"label/seen_before_share": 1, "label/flip_rate": 1}


def test_a_resumed_run_counts_what_an_uninterrupted_one_would(tmp_path: Path) -> None:
    steps = {1: [scored("a", "1"), scored("b", "1")], 2: [scored("a", "2")], 3: [scored("a", "2"), scored("b", "5")]}
    with open_history(tmp_path / "whole.jsonl") as history:
        expected = {step: history.observe(step, groups) for step, groups in steps.items()}
    path = tmp_path / "cut.jsonl"
    with open_history(path) as history:
        history.observe(1, steps[1])
        history.observe(2, [scored("a", "7")])  # of an attempt that was killed after this
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lab')
    with open_history(path, first_step=2) as history:
        assert {step: history.observe(step, steps[step]) for step in (2, 3)} == {2: expected[2], 3: expected[3]}
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_new_run_forgets_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    with open_history(path) as history:
        history.observe(1, [scored("a", "1")])
    with open_history(path, first_step=0) as history:
        assert history.observe(1, [scored("a", "2")]) == {"label/seen_before_share": 0}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"step": 1, "labels": []}\nnonsense\n')
    with pytest.raises(InputError, match="labels.jsonl, line 2"):
        open_history(path, first_step=5)


def test_a_snapshot_is_a_history_that_goes_on_alike(tmp_path: Path) -> None:
    with open_history(tmp_path / "labels.jsonl") as history:
        history.observe(1, [scored("a", "1"), scored("b", "2")])
        history.observe(2, [scored("a", "3")])
        snapshot = history.snapshot(2)
        expected = history.observe(3, [scored("a", "3"), scored("b", "4")])
    (tmp_path / "restored.jsonl").write_bytes(snapshot)
    with open_history(tmp_path / "restored.jsonl", first_step=3) as restored:
        assert restored.observe(3, [scored("a", "3"), scored("b", "4")]) == expected
