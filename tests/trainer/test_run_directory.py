"""Where a run goes on: the newest checkpoint that is whole; nothing is touched where there is none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.checkpoint.inputs import dump_digests
from megatron_coreward.checkpoint.store import (
    TrainerState,
    checkpoint_path,
    finalize_checkpoint,
    new_checkpoint,
    saved_steps,
)
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.trainer.run_directory import (
    changed_keys,
    lock_run_directory,
    log_event,
    open_run_directory,
    resume_hint,
)
from tests.checkpoint.test_store import flip, save, write_actors
from tests.trainer.fakes import make_config

ROOT = Path(__file__).parents[2]


def config_in(tmp_path: Path, **changes: Any) -> RunConfig:
    return make_config(run_dir=tmp_path, **changes)


def test_a_damaged_newest_checkpoint_is_named_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    flip(checkpoint_path(tmp_path, 6) / "megatron" / "__0_0.distcp")
    (checkpoint_path(tmp_path, 4) / "trainer.json").unlink()
    start = open_run_directory(config_in(tmp_path))
    assert start.trainer_state is not None
    assert start.trainer_state.step == 2
    assert saved_steps(tmp_path) == [2]
    six, four = start.notes[:2]
    assert "damaged_step_000006" in six
    assert "__0_0.distcp: its content" in six
    assert "trainer.json: missing" in four
    assert six in (tmp_path / "events.log").read_text()


def test_a_later_attempt_of_one_process_goes_on_from_its_own_checkpoints(tmp_path: Path) -> None:
    config = config_in(tmp_path, **{"checkpoint.resume": "never"})
    save(tmp_path, 2)
    with pytest.raises(InputError, match="checkpoint.resume is never"):
        open_run_directory(config)
    opened = open_run_directory(config, ["actor rank 1 died; all processes are started again"])
    assert opened.steps_done == 2


def test_what_ended_the_attempt_before_is_logged_even_if_the_next_cannot_begin(tmp_path: Path) -> None:
    flip(save(tmp_path, 2) / "megatron" / "common.pt")
    with pytest.raises(InputError, match="has no checkpoint that is whole"):
        open_run_directory(config_in(tmp_path), ["engine 3 died"])
    assert "engine 3 died" in (tmp_path / "events.log").read_text()


def test_with_only_damaged_checkpoints_the_run_is_refused_and_all_stays_as_it_is(tmp_path: Path) -> None:
    for step in (2, 4):
        flip(save(tmp_path, step) / "megatron" / "common.pt")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="has no checkpoint that is whole") as caught:
        open_run_directory(config_in(tmp_path))
    assert "step_000002" in str(caught.value)
    assert "step_000004" in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_sizes_alone_can_be_checked(tmp_path: Path) -> None:
    flip(save(tmp_path, 2) / "megatron" / "common.pt")
    start = open_run_directory(config_in(tmp_path, **{"checkpoint.verify": "sizes"}))
    assert start.trainer_state is not None


def test_a_run_that_died_while_it_wrote_its_final_model_is_not_finished(tmp_path: Path) -> None:
    save(tmp_path, 10)
    start = open_run_directory(config_in(tmp_path))
    assert start.trainer_state is not None
    assert start.trainer_state.step == 10
    (tmp_path / "hf").mkdir()
    assert open_run_directory(config_in(tmp_path)).trainer_state is not None  # nothing is in it
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_text("{}")
    with pytest.raises(InputError, match="has done its 10 steps"):
        open_run_directory(config_in(tmp_path))


def test_the_model_of_a_run_that_is_prolonged_is_not_taken_for_the_final_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"of step 10")
    start = open_run_directory(config_in(tmp_path, steps=20))
    assert start.trainer_state is not None
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "hf_step_000010" / "model.safetensors").read_bytes() == b"of step 10"
    assert any("hf_step_000010" in note for note in start.notes)


HOLD = """
import sys
from pathlib import Path
from megatron_coreward.trainer.run_directory import lock_run_directory
with lock_run_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"run_dir: process {other.pid} on .* trains in"),
            lock_run_directory(run_dir, 0.5),
        ):
            pass
    finally:
        other.kill()
        other.wait(timeout=60)
    for _ in range(2):  # one that was killed holds nothing, nor does one that is done
        with lock_run_directory(run_dir):
            pass


def test_what_a_killed_process_left_behind_goes(tmp_path: Path) -> None:
    save(tmp_path, 2)
    for name in (".step_000004.partial", ".step_000001.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
    open_run_directory(config_in(tmp_path))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]


def test_settings_that_changed_since_the_checkpoint_are_reported(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(config_in(tmp_path)))
    assert changed_keys(saved, config_in(tmp_path)) == []
    assert changed_keys(saved, config_in(tmp_path, **{"actor.lr": 0.5, "seed": 2})) == [
        "seed (1, now 2)",
        "actor.lr (3e-06, now 0.5)",
    ]


def test_the_label_history_comes_back_from_the_checkpoint_where_it_is_missing(tmp_path: Path) -> None:
    from megatron_coreward.checkpoint.store import TrainerState, finalize_checkpoint, new_checkpoint
    from tests.checkpoint.test_store import write_actors

    write_actors(new_checkpoint(tmp_path, TrainerState(1, 1), {"labels.jsonl": b'{"step": 1, "labels": []}\n'}))
    finalize_checkpoint(tmp_path, 1, {}, keep=1)
    open_run_directory(config_in(tmp_path))
    assert (tmp_path / "labels.jsonl").read_text() == '{"step": 1, "labels": []}\n'


def test_the_hint_says_from_where_and_with_what(tmp_path: Path) -> None:
    assert resume_hint(config_in(tmp_path)).startswith("the same command starts from the beginning")
    save(tmp_path, 4)
    assert resume_hint(config_in(tmp_path)) == f"the same command goes on after step 4, in {tmp_path}"
    assert "checkpoint.resume=auto" in resume_hint(config_in(tmp_path, **{"checkpoint.resume": "never"}))


def test_replaced_files_are_refused_or_accepted_with_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    content = dump_digests({"data.train_files[0]": "another"})
    write_actors(new_checkpoint(run_dir, TrainerState(2, 2), {"inputs.json": content}))
    finalize_checkpoint(run_dir, 2, {}, keep=3)
    (train,) = config_in(run_dir).data.train_files
    Path(train).write_text("new questions")
    with pytest.raises(InputError, match=r"data.train_files\[0\]: .*checkpoint.changed_inputs=accept"):
        open_run_directory(config_in(run_dir))
    start = open_run_directory(config_in(run_dir, **{"checkpoint.changed_inputs": "accept"}))
    assert start.trainer_state is not None
    assert (
        f"files were replaced since the checkpoint of step 2: data.train_files[0]: {train}"
        in (run_dir / "events.log").read_text()
    )


def test_what_writers_that_were_killed_left_half_written_goes_and_nothing_else(tmp_path: Path) -> None:
    for name in (".config.yaml.7.tmp", "rollouts/.step_000001.parquet.7.tmp", ".hf.partial/part-1", ".hf.removed/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "mine.tmp").write_text("a user's")
    open_run_directory(config_in(tmp_path))
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["config.yaml", "mine.tmp", "rollouts"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.log").mkdir()
    log_event(config_in(tmp_path), "something")
    (tmp_path / "events.log").rmdir()
    log_event(config_in(tmp_path), "name \x1b[2J\udc80")
    assert (tmp_path / "events.log").read_text().endswith(" name \\x1b[2J\\udc80\n")
