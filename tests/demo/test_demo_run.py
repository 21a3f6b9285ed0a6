"""What the demo trains with, and that it removes nothing that is not its own."""

from pathlib import Path
from typing import get_args

import pytest

from megatron_coreward.config.methods import MethodName
from megatron_coreward.demo.run import demo_config
from megatron_coreward.demo.task import Files

FILES = Files(Path("train"), Path("train_rephrased"), Path("heldout"), Path("heldout_rephrased"))


@pytest.mark.parametrize("method", get_args(MethodName))
def test_every_method_has_a_config_on_the_same_budget(method: MethodName, tmp_path: Path) -> None:
    config = demo_config(method, tmp_path / "start", FILES, tmp_path, 1, [])
    assert (config.steps, config.data.batch_size, config.rollout.n) == (75, 24, 8)
    assert config.run_dir == tmp_path / method
    assert config.actor.tensor_parallel == 2


def test_overrides_are_those_of_train(tmp_path: Path) -> None:
    config = demo_config("entropy", tmp_path / "start", FILES, tmp_path, 1, ["steps=3", "actor.lr=1e-3"])
    assert (config.steps, config.actor.lr) == (3, 1e-3)
