"""Going back leaves the checkpoint from before the indicators as the newest, and a trace that it was done."""

import json
import os
from pathlib import Path

import pytest

from megatron_coreward.checkpoint.store import TrainerState, checkpoint_path, saved_steps
from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.errors import RunError
from megatron_coreward.guard import Decision, Guard
from megatron_coreward.telemetry.rollout_dump import dumped_steps, rollouts_path
from megatron_coreward.trainer.rollback import FILE_NAME, count_rollbacks, open_guard, roll_back
from tests.trainer.fakes import make_config


@pytest.fixture
def decision() -> Decision:
    """Indicators from step 44 on, acted on at step 57."""
    return Decision(57, "act", "rollback", (), lasted=14, good_step=39, news=True)


def run_dir_with(run_dir: Path, checkpoints: list[int], rollouts: range) -> Path:
    for step in checkpoints:
        checkpoint_path(run_dir, step).mkdir(parents=True)
        (checkpoint_path(run_dir, step) / "weights").write_text(str(step))
    (run_dir / "rollouts").mkdir(parents=True)
    for step in rollouts:
        rollouts_path(run_dir, step).touch()
    return run_dir


def test_the_newest_checkpoint_from_before_the_indicators_is_gone_on_from(tmp_path: Path, decision: Decision) -> None:
    run_dir = run_dir_with(tmp_path, [20, 30, 40, 50], range(1, 59))
    assert roll_back(run_dir, decision) == 30
    assert saved_steps(run_dir) == [20, 30]
    aside = sorted(path.name for path in (run_dir / "checkpoints").glob("collapsed_*"))
    assert aside == ["collapsed_step_000040", "collapsed_step_000050"]
    assert max(dumped_steps(run_dir)) == 30
    assert json.loads((run_dir / FILE_NAME).read_text()) == {
        "from": 57,
        "to": 30,
        "reason": "no indicators of collapse",
    }


def test_a_kill_while_checkpoints_are_moved_leaves_no_rollouts_of_weights_that_are_gone(
    tmp_path: Path, decision: Decision, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_dir_with(tmp_path, [30, 40], range(1, 59))

    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        roll_back(run_dir, decision)
    assert max(dumped_steps(run_dir)) == 30
    assert count_rollbacks(run_dir) == 1


def test_every_time_counts_and_raises_the_kl_of_what_follows(tmp_path: Path, decision: Decision) -> None:
    run_dir = run_dir_with(tmp_path, [30], range(0))
    assert count_rollbacks(run_dir) == 0
    for times in (1, 2):
        roll_back(run_dir, decision)
        assert count_rollbacks(run_dir) == times
    assert Guard(GuardSettings(kl_factor=2.0), count_rollbacks(run_dir)).kl_factor == 4.0
    with (run_dir / FILE_NAME).open("a") as file:
        file.write('{"from": 1')
    assert count_rollbacks(run_dir) == 2


@pytest.mark.parametrize("checkpoints", [[], [40, 50]])
def test_without_a_checkpoint_that_is_old_enough_nothing_is_touched(
    tmp_path: Path, decision: Decision, checkpoints: list[int]
) -> None:
    run_dir = run_dir_with(tmp_path, checkpoints, range(1, 5))
    with pytest.raises(RunError, match=r"checkpoint of step 39 or earlier is needed.*checkpoint\.every"):
        roll_back(run_dir, decision)
    assert saved_steps(run_dir) == checkpoints
    assert len(dumped_steps(run_dir)) == 4
    assert count_rollbacks(run_dir) == 0


def test_a_resumed_run_has_the_guard_that_was_saved_and_counts_its_rollbacks(
    tmp_path: Path, decision: Decision
) -> None:
    config = make_config("majority_voting", run_dir=tmp_path)
    guard = open_guard(config, None)
    for step in range(1, 15):
        guard.observe(step, {"vote/share": 0.5 + step / 100, "rollout/response_tokens_mean": 100.0 - step})
    saved = guard.state_dict()
    assert saved != open_guard(config, TrainerState(14, 14)).state_dict()  # of a run without a guard
    roll_back(run_dir_with(tmp_path, [30], range(0)), decision)
    again = open_guard(config, TrainerState(14, 14, guard=saved))
    assert again.state_dict() == saved
    assert again.kl_factor == config.guard.kl_factor != 1
