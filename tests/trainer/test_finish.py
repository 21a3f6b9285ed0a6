"""Whatever is missing between a run's last step and its last file is written by the same command, and only that."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_coreward.attempt import FINISHED
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import sinks
from megatron_coreward.telemetry.jsonl import JsonlSink
from megatron_coreward.telemetry.trackers import note_missed, read_missed
from megatron_coreward.trainer import finish
from megatron_coreward.trainer.run_directory import interrupt_says_how_to_go_on
from tests.checkpoint.test_store import save
from tests.telemetry.test_trackers import FakeTracker
from tests.trainer.fakes import make_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of ten steps with everything that comes before its final model."""
    config = make_config(run_dir=tmp_path / "run")
    save(config.run_dir, 10)
    sink = JsonlSink(config.run_dir / "metrics.jsonl")
    for step in range(11):
        sink.write(step, {"step_time_s": 1.0, "reward/mean": 0.5})
    sink.close()
    return config


def write_model(config: RunConfig, files: int = 1) -> None:
    folder = config.run_dir / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    names = [f"model-{i}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    for name in names:
        (folder / name).write_bytes(b"weights")
    if files > 1:
        index = {"weight_map": {f"tensor {i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("lost", ["config.json", "model-1.safetensors", "model.safetensors.index.json"])
def test_a_model_with_a_file_missing_is_none(config: RunConfig, lost: str) -> None:
    assert not finish.is_trained(config)
    write_model(config, files=2)
    assert finish.is_trained(config)
    (config.run_dir / "hf" / lost).unlink()
    assert not finish.is_trained(config)


def test_a_run_that_is_shorter_than_asked_for_is_not_trained(config: RunConfig) -> None:
    write_model(config)
    assert not finish.is_trained(config.model_copy(update={"steps": 11}))


def test_the_page_and_the_rows_of_trackers_are_completed_once(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, notes = FakeTracker(), list[str]()
    monkeypatch.setattr(finish, "trackers_of", lambda *_: [fake.tracker()])
    write_model(config)
    note_missed(config.run_dir, "fake", 7)
    assert finish.missing(config) == ["report.html", "rows of fake"]
    finish.complete(config, notes.append)
    assert finish.missing(config) == []
    assert (config.run_dir / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(fake.rows) == [7, 8, 9, 10]
    assert notes == ["fake has the rows from step 7 on"]
    written = (config.run_dir / "report.html").stat().st_mtime_ns
    finish.complete(config, notes.append)
    assert (config.run_dir / "report.html").stat().st_mtime_ns == written
    assert fake.finished == 1


def test_completing_asks_nothing_of_the_machine_and_refuses_another_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither GPUs nor a model are there, which preflight would say."""
    from megatron_coreward.trainer import run

    def unasked(_: RunConfig) -> None:
        raise AssertionError("preflight was asked")

    monkeypatch.setattr(run, "preflight", unasked)
    write_model(config)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    another = config.model_copy(update={"actor": config.actor.model_copy(update={"lr": 0.5})})
    with pytest.raises(InputError, match="actor.lr: 0.5, but the run in"):
        run.train(another)
    assert not (config.run_dir / "report.html").exists()
    assert run.train(config) == config.run_dir
    assert (config.run_dir / "report.html").is_file()


def test_a_tracker_that_is_no_longer_used_is_not_missing(config: RunConfig) -> None:
    write_model(config)
    (config.run_dir / "report.html").touch()
    note_missed(config.run_dir, "wandb", 5)
    assert config.telemetry.wandb_project is None
    assert finish.missing(config) == []


def test_what_cannot_be_completed_fails_nothing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(sinks, "TensorBoard", lambda *_: 1 / 0)
    write_model(config)
    (config.run_dir / "report.html").mkdir()
    note_missed(config.run_dir, "tensorboard", 3)
    finish.complete(config, notes.append)
    page, tracker = notes
    assert page.startswith(
        f"report.html was not written: cannot write {config.run_dir / 'report.html'}: Is a directory; "
    )
    assert page.endswith(f"`megatron-coreward report {config.run_dir}` tries again")
    assert tracker.startswith("tensorboard failed when it was opened (ZeroDivisionError")
    assert read_missed(config.run_dir) == {"tensorboard": 3}


def test_an_error_of_the_page_that_nobody_expected_is_reported_with_its_kind(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(finish, "write_report", lambda run_dir: 1 // 0)
    finish.try_report(config, notes.append)
    assert notes == [
        "report.html was not written: ZeroDivisionError: integer division or modulo by zero; "
        f"`megatron-coreward report {config.run_dir}` tries again"
    ]


def test_an_error_behind_the_final_model_is_reported_and_one_before_it_is_raised(config: RunConfig) -> None:
    notes: list[str] = []
    with pytest.raises(RuntimeError, match="in the export"), finish.nothing_after_it_counts(config, notes.append):
        raise RuntimeError("in the export")
    with finish.nothing_after_it_counts(config, notes.append):
        write_model(config)
        raise RuntimeError("a worker would not leave")
    assert notes == ["the run is complete; what came after it: RuntimeError: a worker would not leave"]
    with pytest.raises(KeyboardInterrupt), finish.nothing_after_it_counts(config, notes.append):
        raise KeyboardInterrupt


def test_ctrl_c_says_from_where_the_same_command_goes_on(config: RunConfig) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupt_says_how_to_go_on(config):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [f"the same command goes on after step 10, in {config.run_dir}"]


INTERRUPTED = """
import sys, time
from megatron_coreward import cli
from megatron_coreward.commands import train
from megatron_coreward.trainer.run_directory import interrupt_says_how_to_go_on
from tests.trainer.fakes import make_config

def run(options):
    with interrupt_says_how_to_go_on(make_config(run_dir=options.config)):
        print("begun", flush=True)
        time.sleep(60)

train._train = run
sys.argv = ["megatron-coreward", "train", sys.argv[1]]
cli.console()
"""


@pytest.mark.long
def test_a_real_ctrl_c_is_one_line_with_status_1(config: RunConfig) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(config.run_dir)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with Ctrl-C ignored, and this may be run by such a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert printed == f"interrupted; the same command goes on after step 10, in {config.run_dir}\n"


def test_a_job_completes_what_is_missing_and_is_finished(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megatron_coreward import attempt, cli
    from megatron_coreward.config.load import dump_config

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config))
    write_model(config)
    calls: list[list[str]] = []

    def train(arguments: list[str]) -> int:
        calls.append(arguments)
        finish.complete(config, calls.append)
        return 0

    monkeypatch.setattr(cli, "main", train)
    assert attempt.attempt(recipe) == FINISHED
    assert len(calls) == 1
    assert attempt.attempt(recipe) == FINISHED
    assert len(calls) == 1
