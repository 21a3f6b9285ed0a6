import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_coreward.errors import InputError, RunError
from megatron_coreward.telemetry.rollout_dump import (
    SCHEMA,
    ScoredGroup,
    discard_rollouts,
    dump_rollouts,
    dumped_steps,
    read_rollouts,
    rollouts_path,
)
from megatron_coreward.types import Completion, Prompt, Role, RolloutGroup


def completion(text: str = "so \\boxed{4}", answer: str | None = "4", tokens: int = 3) -> Completion:
    return Completion(
        token_ids=np.arange(tokens, dtype=np.int32),
        logprobs=-np.linspace(0.1, 1.0, tokens, dtype=np.float32),
        text=text,
        answer=answer,
        finish_reason="stop" if answer else "length",
        weight_version=7,
    )


def group(*completions: Completion, uid: str = "math/1", role: Role = "policy") -> RolloutGroup:
    return RolloutGroup(uid, "original", role, Prompt("2 + 2?", np.array([5, 6], dtype=np.int32)), completions)


def policy_group(uid: str = "math/1", label: str | None = "4") -> ScoredGroup:
    rewards, advantages = np.array([1.0, 0.0], dtype=np.float32), np.array([0.7, -0.7], dtype=np.float32)
    members = group(completion(), completion("I do not know", None, tokens=1), uid=uid)
    return ScoredGroup(members, label, rewards, advantages, ground_truth="4")


def teacher_group() -> ScoredGroup:
    return ScoredGroup(group(completion(), role="teacher"), None, None, None)


def assert_same(read: list[ScoredGroup], written: list[ScoredGroup]) -> None:
    assert len(read) == len(written)
    for a, b in zip(read, written, strict=True):
        assert (a.group.uid, a.group.view, a.group.role, a.label, a.ground_truth) == (
            b.group.uid,
            b.group.view,
            b.group.role,
            b.label,
            b.ground_truth,
        )
        assert a.group.prompt.text == b.group.prompt.text
        np.testing.assert_array_equal(a.group.prompt.token_ids, b.group.prompt.token_ids)
        for x, y in ((a.rewards, b.rewards), (a.advantages, b.advantages)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                np.testing.assert_array_equal(x, y, strict=True)
        for c, d in zip(a.group.completions, b.group.completions, strict=True):
            assert (c.text, c.answer, c.finish_reason, c.weight_version) == (
                d.text,
                d.answer,
                d.finish_reason,
                d.weight_version,
            )
            np.testing.assert_array_equal(c.token_ids, d.token_ids, strict=True)
            np.testing.assert_array_equal(c.logprobs, d.logprobs, strict=True)


def test_a_file_has_one_row_a_completion_with_the_columns_that_users_read(tmp_path: Path) -> None:
    path = dump_rollouts(tmp_path, 3, [policy_group(), teacher_group()])
    assert path == tmp_path / "rollouts" / "step_000003.parquet"
    rows = pq.read_table(path).to_pylist()
    assert [row["role"] for row in rows] == ["policy", "policy", "teacher"]
    first = rows[0]
    assert first | {"logprobs": None} == {
        "uid": "math/1",
        "view": "original",
        "role": "policy",
        "group": 0,
        "prompt": "2 + 2?",
        "prompt_token_ids": [5, 6],
        "text": "so \\boxed{4}",
        "token_ids": [0, 1, 2],
        "logprobs": None,
        "answer": "4",
        "ground_truth": "4",
        "pseudo_label": "4",
        "reward": 1.0,
        "advantage": pytest.approx(0.7),
        "weight_version": 7,
        "later_versions": None,
        "finish_reason": "stop",
    }
    assert first["logprobs"] == pytest.approx([-0.1, -0.55, -1.0])
    assert (rows[1]["answer"], rows[1]["finish_reason"]) == (None, "length")
    assert (rows[2]["reward"], rows[2]["advantage"]) == (None, None)


def test_groups_come_back_as_they_were_even_when_a_question_is_there_twice(tmp_path: Path) -> None:
    written = [policy_group(), policy_group(label=None), teacher_group(), policy_group("math/2")]
    assert_same(read_rollouts(dump_rollouts(tmp_path, 1, written)), written)


def test_a_dump_with_the_former_names_of_columns_is_read(tmp_path: Path) -> None:
    written = [policy_group(), teacher_group()]
    path = dump_rollouts(tmp_path, 1, written)
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["gold" if n == "ground_truth" else n for n in table.column_names]), path)
    assert_same(read_rollouts(path), written)


texts = st.text(max_size=8)


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    role: Role = draw(st.sampled_from(("policy", "teacher")))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    completions = tuple(
        Completion(
            np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)), dtype=np.int32),
            np.array(draw(st.lists(st.floats(-50, 0, width=32), min_size=n, max_size=n)), dtype=np.float32),
            draw(texts),
            draw(st.none() | texts),
            draw(st.sampled_from(("stop", "length"))),
            draw(st.integers(0, 2**40)),
        )
        for n in lengths
    )
    values = np.array(
        draw(st.lists(st.floats(-2, 2, width=32), min_size=len(lengths), max_size=len(lengths))), np.float32
    )
    numbers = values if role == "policy" else None
    prompt = Prompt(draw(texts), np.array(draw(st.lists(st.integers(0, 99), max_size=3)), dtype=np.int32))
    members = RolloutGroup(draw(texts), draw(st.sampled_from(("original", "rephrased"))), role, prompt, completions)
    return ScoredGroup(members, draw(st.none() | texts), numbers, numbers, draw(st.none() | texts))


@settings(max_examples=30)
@given(written=st.lists(scored_groups(), max_size=4))
def test_any_step_survives_the_file(written: list[ScoredGroup], tmp_path_factory: pytest.TempPathFactory) -> None:
    assert_same(read_rollouts(dump_rollouts(tmp_path_factory.mktemp("run"), 1, written)), written)


@pytest.mark.parametrize(
    ("role", "rewards", "advantages", "message"),
    [
        ("policy", None, np.zeros(1, np.float32), "rewards belong"),
        ("policy", np.zeros(1, np.float32), None, "advantages belong"),
        ("teacher", np.zeros(1, np.float32), None, "rewards belong"),
        ("policy", np.zeros(2, np.float32), np.zeros(1, np.float32), r"rewards of shape \(2,\) for 1 completions"),
    ],
)
def test_numbers_that_do_not_fit_the_group_are_refused(
    role: Role, rewards: np.ndarray | None, advantages: np.ndarray | None, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"group math/1 \(original, {role}\): {message}"):
        ScoredGroup(group(completion(), role=role), "4", rewards, advantages)


def test_a_group_without_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="no completions"):
        ScoredGroup(group(), None, np.zeros(0, np.float32), np.zeros(0, np.float32))


def test_a_dump_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match=r"cannot write .*/step_000001.parquet: No space left on device; make room"):
        dump_rollouts(tmp_path, 1, [policy_group()])
    assert list((tmp_path / "rollouts").iterdir()) == []


def test_resuming_discards_what_will_be_sampled_again(tmp_path: Path) -> None:
    assert dumped_steps(tmp_path) == {}
    for step in (10, 2, 1_000_000, 9):
        dump_rollouts(tmp_path, step, [policy_group()])
    (tmp_path / "rollouts" / "step_notes.parquet").write_text("a user's own file")
    assert list(dumped_steps(tmp_path)) == [2, 9, 10, 1_000_000]
    discard_rollouts(tmp_path, 10)
    assert dumped_steps(tmp_path) == {step: rollouts_path(tmp_path, step) for step in (2, 9)}


def test_what_is_no_file_of_rollouts_is_bad_input_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step_000001\.parquet: not a file of rollouts"):
        read_rollouts(rollouts_path(tmp_path, 1))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"broken\.parquet: not a file of rollouts"):
        read_rollouts(broken)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["2 + 2?"]}), other)
    with pytest.raises(InputError, match=r"other\.parquet: columns \['prompt'\]"):
        read_rollouts(other)


def test_a_dump_is_within_a_path_that_looks_like_a_partition(tmp_path: Path) -> None:
    run_dir = tmp_path / "lr=1e-6"
    written = [policy_group()]
    path = dump_rollouts(run_dir, 1, written)
    assert_same(read_rollouts(path), written)
    assert pq.ParquetFile(path).schema_arrow.names == SCHEMA.names


def test_the_versions_of_later_tokens_are_kept_and_older_files_have_none(tmp_path: Path) -> None:
    first, second = policy_group().group.completions
    first = replace(first, later_versions=((1, 8), (2, 10)))
    second = replace(second, logprobs=np.empty(0, dtype=np.float32))
    path = dump_rollouts(tmp_path, 1, [replace(policy_group(), group=group(first, second))])
    read = [c for item in read_rollouts(path) for c in item.group.completions]
    assert [c.later_versions for c in read] == [((1, 8), (2, 10)), ()]
    assert read[0].token_versions.tolist() == [7, 8, 10]
    assert len(read[1].logprobs) == 0
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["later_versions"]), path)
    read = [c for item in read_rollouts(path) for c in item.group.completions]
    assert [(c.weight_version, c.later_versions) for c in read] == [(7, ()), (7, ())]
