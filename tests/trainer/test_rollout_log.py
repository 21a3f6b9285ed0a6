"""A step that died in its update is done again from the rollout log, without asking an engine, to the same update."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.rollout_dump import dumped_steps
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.loop import StepResult, Trainer
from megatron_coreward.trainer.rollout_log import RolloutLog, fingerprint_of
from tests.trainer.fakes import FakeActors, FakeEngines, make_config, make_problem
from tests.trainer.test_loop import make_trainer

UNTIMED = ("seconds", "per_s")


def trainer_with(rollout_log: RolloutLog, method: str) -> tuple[Trainer, list[str], FakeActors, FakeEngines]:
    return make_trainer(method, log=rollout_log)


def untimed(result: StepResult) -> dict[str, float]:
    return {k: v for k, v in result.metrics.items() if not k.endswith(UNTIMED)}


@pytest.mark.parametrize("method", ["co_rewarding_i", "co_rewarding_ii", "entropy"])
def test_a_recorded_step_gives_the_same_update_and_metrics_without_engines(tmp_path: Path, method: str) -> None:
    first, _, actors, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), method)
    expected = first.step(1, PhaseTimer())

    log = RolloutLog(tmp_path, "f", 1, keep=True)
    again, events, other, engines = trainer_with(log, method)
    assert log.num_recorded == 1
    result = again.step(1, PhaseTimer())
    assert engines.requests == []
    assert not [e for e in events if e.split()[0] in ("sample", "receive", "open", "send")]
    assert untimed(result) == untimed(expected)
    for name in ("advantages", "token_weights"):
        np.testing.assert_array_equal(getattr(other.batches[0], name), getattr(actors.batches[0], name))
    for one, two in zip(other.batches[0].sequences.token_ids, actors.batches[0].sequences.token_ids, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_recorded_rewards_count_even_if_the_method_would_now_give_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, actors, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), "majority_voting")
    first.step(1, PhaseTimer())
    again, _, other, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), "majority_voting")

    def refuse(*ignored: Any) -> Any:
        raise AssertionError("a recorded step is not scored")

    monkeypatch.setattr(type(METHODS["majority_voting"]), "score", refuse)
    again.step(1, PhaseTimer())
    np.testing.assert_array_equal(other.batches[0].advantages, actors.batches[0].advantages)


def test_the_log_is_written_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, actors, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), "co_rewarding_i")

    def die(batch: Any) -> dict[str, float]:
        raise ConnectionError("the rank is gone")

    monkeypatch.setattr(actors, "update", die)
    with pytest.raises(ConnectionError):
        trainer.step(1, PhaseTimer())
    assert list(dumped_steps(tmp_path)) == [1]


def test_what_was_drawn_under_other_settings_is_dropped_with_all_that_follows(tmp_path: Path) -> None:
    for step, fingerprint in ((1, "old"), (2, "new"), (3, "old"), (4, "new")):
        trainer, _, _, _ = trainer_with(RolloutLog(tmp_path, fingerprint, step, keep=True), "majority_voting")
        trainer.step(step, PhaseTimer())
    assert list(dumped_steps(tmp_path)) == [1, 2, 3, 4]
    rollout_log = RolloutLog(tmp_path, "new", 2, keep=True)
    assert rollout_log.num_recorded == 1
    assert list(dumped_steps(tmp_path)) == [1, 2]


@pytest.mark.parametrize(("version", "backwards"), [(2, False), (0, True)], ids=["other weights", "other questions"])
def test_rollouts_of_other_weights_or_questions_are_dropped(tmp_path: Path, version: int, backwards: bool) -> None:
    trainer, _, _, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), "majority_voting")
    trainer.step(1, PhaseTimer())
    problems = [make_problem(0), make_problem(1)]
    rollout_log = RolloutLog(tmp_path, "f", 1, keep=True)
    assert rollout_log.read(1, problems, ("original",), {0}) is not None
    assert rollout_log.read(1, problems[::-1] if backwards else problems, ("original",), {version}) is None
    assert list(dumped_steps(tmp_path)) == []


def test_a_step_whose_rows_are_damaged_is_sampled_again(tmp_path: Path) -> None:
    first, _, _, _ = trainer_with(RolloutLog(tmp_path, "f", 1, keep=True), "majority_voting")
    expected = first.step(1, PhaseTimer())
    path = dumped_steps(tmp_path)[1]
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little")  # it holds the notes, and stays whole
    rows = slice(4, len(content) - 8 - footer)
    content[rows] = bytes(rows.stop - rows.start)
    path.write_bytes(content)
    log = RolloutLog(tmp_path, "f", 1, keep=True)
    assert log.num_recorded == 1
    again, _, _, engines = trainer_with(log, "majority_voting")
    assert untimed(again.step(1, PhaseTimer())) == untimed(expected)
    assert engines.requests != []


def test_without_a_dump_the_log_goes_when_a_checkpoint_covers_it(tmp_path: Path) -> None:
    rollout_log = RolloutLog(tmp_path, "f", 1, keep=False)
    trainer, _, _, _ = trainer_with(rollout_log, "majority_voting")
    for step in (1, 2, 3):
        trainer.step(step, PhaseTimer())
    rollout_log.covered(2)
    assert list(dumped_steps(tmp_path)) == [3]


class TestTheFingerprint:
    @pytest.fixture
    def files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "model").mkdir()
        for name in ("model/model.safetensors", "train.parquet", "rephrased.parquet"):
            (tmp_path / name).write_text("x")
        return tmp_path

    def test_settings_that_change_nothing_of_the_weights_leave_it(self, files: Path) -> None:
        changes = {"checkpoint.every": 3, "telemetry.console": "plain", "faults.max_restarts": 2, "run_dir": "other"}
        assert fingerprint_of(make_config(**changes)) == fingerprint_of(make_config())

    @pytest.mark.parametrize("change", ["actor.lr=1e-3", "seed=2", "rollout.n=5", "steps=11", "loss.clip_low=0.1"])
    def test_settings_that_decide_what_is_sampled_change_it(self, files: Path, change: str) -> None:
        key, value = change.split("=")
        assert fingerprint_of(make_config(**{key: value})) != fingerprint_of(make_config())

    def test_another_model_at_the_same_place_changes_it(self, files: Path) -> None:
        before = fingerprint_of(make_config())
        (files / "model" / "model.safetensors").write_text("xy")
        assert fingerprint_of(make_config()) != before


def test_a_recorded_step_that_votes_on_more_than_it_trains_on_is_the_same(tmp_path: Path) -> None:
    updates = []
    for _ in range(2):
        log = RolloutLog(tmp_path, "f", 1, keep=True)
        trainer, _, actors, _ = make_trainer("majority_voting", log=log, **{"rollout.votes": 7})
        trainer.step(1, PhaseTimer())
        updates.append(actors.batches[0])
    np.testing.assert_array_equal(updates[0].advantages, updates[1].advantages)
    for one, two in zip(updates[0].sequences.token_ids, updates[1].sequences.token_ids, strict=True):
        np.testing.assert_array_equal(one, two)
