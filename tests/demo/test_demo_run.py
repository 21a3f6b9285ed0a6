"""What the demo trains with, and that it removes nothing that is not its own."""

from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from megatron_coreward.config.methods import MethodName
from megatron_coreward.demo import run
from megatron_coreward.demo.run import demo_config
from megatron_coreward.demo.task import Files

FILES = Files(Path("train"), Path("train_rephrased"), Path("heldout"), Path("heldout_rephrased"))


@pytest.mark.parametrize("method", get_args(MethodName))
def test_every_method_has_a_config_on_the_same_budget(method: MethodName, tmp_path: Path) -> None:
    config = demo_config(method, tmp_path / "start", FILES, tmp_path, 1, [])
    assert (config.steps, config.data.batch_size, config.rollout.n) == (45, 24, 8)
    assert config.run_dir == tmp_path / method
    assert (config.actor.data_parallel, config.rollout.num_engines) == (2, 2)  # two cores are busy in every phase


def test_overrides_are_those_of_train(tmp_path: Path) -> None:
    config = demo_config("entropy", tmp_path / "start", FILES, tmp_path, 1, ["steps=3", "actor.lr=1e-3"])
    assert (config.steps, config.actor.lr) == (3, 1e-3)


@pytest.mark.parametrize("method", ["co_rewarding_i", "entropy"])
def test_one_line_says_what_comes_next_and_a_model_that_is_there_is_used(
    method: MethodName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []
    monkeypatch.setattr(run, "warm_start", lambda random, start, *_, **__: begun.append(start) or 7)
    monkeypatch.setattr(run, "write_model", lambda *_, **__: None)
    for starts in ("next: a supervised warm start (about a minute), then 45 steps", "next: 45 steps"):
        console = Console(record=True, width=200)
        config = run._prepare(console, method, tmp_path, 1, [])
        (line,) = [line for line in console.export_text().splitlines() if line.startswith("next: ")]
        assert line.startswith(starts)
        assert f"45 steps of {method} without labels (about 2 minutes)" in line
        assert config.model.hf_path == tmp_path / "start-1"
        config.model.hf_path.mkdir(exist_ok=True)
        (config.model.hf_path / "config.json").touch()
    assert begun == [tmp_path / "start-1"]
