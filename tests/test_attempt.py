"""An attempt's exit status: finished, to be run again, failed, bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_coreward import attempt, cli
from megatron_coreward.checkpoint.store import checkpoint_path
from megatron_coreward.launch.scripts import CONFIG_VARIABLE
from tests.launch.arguments import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def write_end(run_dir: Path) -> None:
    """The files of a run that nothing is missing of."""
    (run_dir / "hf").mkdir()
    for name in ("hf/config.json", "hf/model.safetensors", "report.html"):
        (run_dir / name).write_text("")


def run(recipe: Path, monkeypatch: pytest.MonkeyPatch, status: int, reached: int, model: bool = False) -> int:
    """An attempt whose training writes a checkpoint of step `reached` (0: none) and returns `status`."""
    run_dir = recipe.parent / "Run_1"

    def train(arguments: list[str]) -> int:
        assert arguments == ["train", str(recipe)]
        if reached:
            checkpoint_path(run_dir, reached).mkdir(parents=True, exist_ok=True)
        if model:
            write_end(run_dir)
        return status

    monkeypatch.setattr(cli, "main", train)
    return attempt.attempt(recipe)


def test_all_steps_and_the_model_are_finished(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe, monkeypatch, status=0, reached=3, model=True) == 0


def test_a_finished_run_is_not_trained_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe, monkeypatch, status=0, reached=3, model=True)
    monkeypatch.setattr(cli, "main", lambda arguments: pytest.fail("trained again"))
    assert attempt.attempt(recipe) == 0


@pytest.mark.parametrize(
    ("reached", "model"), [(0, False), (2, False), (3, False), (2, True)], ids=["none", "some", "no model", "old model"]
)
def test_a_clean_stop_before_the_end_is_to_be_run_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, reached: int, model: bool
) -> None:
    assert run(recipe, monkeypatch, status=0, reached=reached, model=model) == 75


def test_a_failure_is_run_again_only_after_progress(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe, monkeypatch, status=1, reached=1) == 75
    assert run(recipe, monkeypatch, status=1, reached=1) == 1


def test_a_run_that_went_back_and_wrote_the_same_step_again_has_made_progress(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint_path(recipe.parent / "Run_1", 2)

    def train(arguments: list[str]) -> int:
        saved.rename(saved.with_name("collapsed_step_000002"))
        saved.mkdir()
        return 1

    saved.mkdir(parents=True)
    os.utime(saved, (0, 0))
    monkeypatch.setattr(cli, "main", train)
    assert attempt.attempt(recipe) == 75


def test_a_run_that_its_guard_has_halted_is_never_run_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe, monkeypatch, status=3, reached=1) == 3


def test_bad_input_is_never_run_again(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(recipe, monkeypatch, status=2, reached=1) == 2
    recipe.write_text("stepz: 3\n")
    assert attempt.attempt(recipe) == 2


def test_the_status_is_written_and_an_old_one_goes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tmp_path / "exit_status"
    status.write_text("0\n")
    absent = tmp_path / "absent"
    assert attempt.main([str(recipe), "--secret", f"TOKEN={absent}", "--status-file", str(status)]) == 2
    assert status.read_text() == "2\n"
    assert f"secret TOKEN: {absent}: No such file" in capsys.readouterr().err


def test_the_recipe_may_come_from_the_environment(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe.parent / "Run_1/checkpoints/step_000003").mkdir(parents=True)
    write_end(recipe.parent / "Run_1")
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    assert attempt.main([]) == 2
    monkeypatch.setenv(CONFIG_VARIABLE, recipe.read_text())
    assert attempt.main([]) == 0


def test_secrets_are_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "")
    (tmp_path / "token").write_text("hush\n")
    attempt.read_secrets([f"SOME_TOKEN={tmp_path / 'token'}"])
    assert os.environ["SOME_TOKEN"] == "hush"


def test_the_former_name_of_the_module_ends_with_the_new_one() -> None:
    former = [sys.executable, "-m", "megatron_coreward.launch.attempt", "config.yaml"]
    done = subprocess.run(former, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "python -m megatron_coreward.attempt now" in done.stderr
