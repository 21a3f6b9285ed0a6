"""Checkpoints appear whole or not at all, damage is found and named, old ones go and the best stays."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_coreward.checkpoint.safe_load import COMMON_STATE
from megatron_coreward.checkpoint.store import (
    DamagedCheckpoint,
    TrainerState,
    check_checkpoint,
    checkpoint_path,
    discard_unfinished,
    finalize_checkpoint,
    new_checkpoint,
    read_trainer_state,
    saved_steps,
    set_aside,
)


def write_actors(folder: Path) -> None:
    """The files without which a distributed checkpoint is none, and one with weights."""
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    (folder / "common.pt").write_bytes(b"common")
    (folder / "__0_0.distcp").write_bytes(b"weights" * 100)


def save(run_dir: Path, step: int, keep: int = 2, score: float | None = None, **options: Any) -> Path:
    trainer_state = TrainerState(step, 2 * step, step, score=score, guard={"alarms": step})
    write_actors(new_checkpoint(run_dir, trainer_state, {"config.yaml": b"steps: 3\n"}))
    return finalize_checkpoint(run_dir, step, {}, keep=keep, **options)


def test_a_description_of_the_former_form_is_read(tmp_path: Path) -> None:
    former = {"step": 3, "num_updates": 3, "teacher_moves": 2, "score": 0.5}
    extra = {"guard": {"seen": 3}, "first_accuracy": 0.25, "unfinished_row": {"reward/mean": None}}
    (tmp_path / "trainer.json").write_text(json.dumps(former | {"extra": extra}))
    expected = TrainerState(step=3, num_updates=3, teacher_updates=2, score=0.5, **extra)
    assert read_trainer_state(tmp_path) == expected


def test_what_is_saved_is_found_and_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert saved_steps(tmp_path) == [3]
    assert check_checkpoint(path) == TrainerState(3, 6, 3, guard={"alarms": 3})
    assert (path / "config.yaml").read_text() == "steps: 3\n"


def test_hashes_that_the_writers_computed_are_taken_over(tmp_path: Path) -> None:
    write_actors(new_checkpoint(tmp_path, TrainerState(1, 1), {}))
    path = finalize_checkpoint(tmp_path, 1, {"__0_0.distcp": (700, "of the writer")}, keep=1)
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: its content"):
        check_checkpoint(path)
    check_checkpoint(path, contents=False)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert saved_steps(tmp_path) == [2, 3]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step_000002", "step_000003"}


@pytest.mark.parametrize(("best", "kept"), [("highest", [2, 5]), ("lowest", [3, 5])])
def test_the_best_by_its_score_stays_beside_the_newest(tmp_path: Path, best: str, kept: list[int]) -> None:
    for step, score in enumerate((0.4, 0.8, 0.1, None, 0.5), start=1):
        save(tmp_path, step, keep=1, score=score, best=best)
    assert saved_steps(tmp_path) == kept


def test_scores_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    """`checkpoint.best_metric` was changed after step 2; the score of step 1 is one of a form without a name."""
    for step, (score, metric) in enumerate([(0.6, None), (9.0, "reward/mean"), (0.4, "val/avg@8")], start=1):
        write_actors(new_checkpoint(tmp_path, TrainerState(step, step, score=score, score_metric=metric), {}))
        finalize_checkpoint(tmp_path, step, {}, keep=1 if step == 3 else 3, best_metric="val/avg@8")
    assert saved_steps(tmp_path) == [1, 3]


def test_of_two_that_are_equally_good_the_newer_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1, score=0.5 if step < 3 else 0.1)
    assert saved_steps(tmp_path) == [2, 3]


def test_a_checkpoint_that_was_not_complete_is_none_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_actors(new_checkpoint(tmp_path, TrainerState(2, 2), {}))
    assert saved_steps(tmp_path) == [1]
    discard_unfinished(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    write_actors(new_checkpoint(tmp_path, TrainerState(1, 7), {}))
    assert check_checkpoint(finalize_checkpoint(tmp_path, 1, {}, keep=2)).num_updates == 7


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_common_state_is_a_file_or_an_object_that_the_metadata_names(tmp_path: Path) -> None:
    for step, objects in enumerate(({}, {COMMON_STATE: BytesStorageMetadata()})):
        write_actors(target := new_checkpoint(tmp_path, TrainerState(step, step), {}))
        (target / "common.pt").unlink()
        (target / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=dict(objects), storage_data={})))
        finalize_checkpoint(tmp_path, step, {}, keep=2)
    with pytest.raises(
        DamagedCheckpoint, match=r"names no megatron/common.pt, and .metadata no common_state/shard_0_1"
    ):
        check_checkpoint(checkpoint_path(tmp_path, 0))
    assert check_checkpoint(checkpoint_path(tmp_path, 1)) == TrainerState(1, 1)


@pytest.mark.parametrize("name", ["megatron/__0_0.distcp", "megatron/common.pt", "trainer.json", "config.yaml"])
def test_one_flipped_bit_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    flip(path / name)
    with pytest.raises(DamagedCheckpoint, match=f"{name}: its content is not what was written"):
        check_checkpoint(path)


def test_a_file_that_lacks_bytes_or_is_gone_is_named_without_reading_contents(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    os.truncate(path / "megatron" / "__0_0.distcp", 10)
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: 10 bytes, 700 were written"):
        check_checkpoint(path, contents=False)
    (path / "megatron" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match="__0_0.distcp: missing"):
        check_checkpoint(path, contents=False)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"files": []}', '{"files": {}}', '{"files": {"../../passwd": {"bytes": 1, "blake3": ""}}}'],
)
def test_a_manifest_that_says_nothing_sensible_is_damage(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 1)
    (path / "files.json").write_text(content)
    with pytest.raises(DamagedCheckpoint):
        check_checkpoint(path)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("hostile",))


def test_metadata_that_would_run_code_is_refused_though_its_checksum_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = new_checkpoint(tmp_path, TrainerState(1, 1), {})
    write_actors(target)
    (target / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    path = finalize_checkpoint(tmp_path, 1, {}, keep=1)
    with pytest.raises(DamagedCheckpoint, match="posix.mkdir"):
        check_checkpoint(path)
    assert not Path("hostile").exists()


def test_a_damaged_one_is_set_aside_and_no_longer_counts(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    aside = set_aside(checkpoint_path(tmp_path, 2))
    assert aside.name == "damaged_step_000002"
    assert saved_steps(tmp_path) == [1]
