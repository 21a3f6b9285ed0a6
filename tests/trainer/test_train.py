"""What surrounds a step: rows before checkpoints, a clean stop at any point, steps that teach nothing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.checkpoint.store import Hashes, TrainerState, check_checkpoint, checkpoint_path, saved_steps
from megatron_coreward.cluster.preemption import Preempted, StopRequest
from megatron_coreward.config.guard import GuardAction, GuardSettings
from megatron_coreward.errors import RunError
from megatron_coreward.guard import Decision, Guard
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.rollback import Collapsing
from megatron_coreward.types import Completion, TrainBatch
from tests.checkpoint.test_store import write_actors
from tests.trainer.fakes import FakeActors, FakeEngines, FakeWorkers, make_config
from tests.trainer.test_loop import make_trainer


class SavingFakes(FakeWorkers):
    """Actors whose files are written when somebody waits for them, or when `slow` says so."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.target, self.slow = events, Path(), True
        self.error: Exception | None = None

    def begin_save(self, target: Path) -> None:
        self.events.append("begin save")
        self.target = target

    def save_written(self) -> bool:
        return not self.slow

    def finish_save(self) -> Hashes:
        if self.error is not None:
            raise self.error
        write_actors(self.target)
        self.events.append("saved")
        return {}


@dataclass
class World:
    trainer: Trainer
    events: list[str]
    actors: FakeActors
    engines: FakeEngines
    saving: SavingFakes
    rows: list[tuple[int, dict[str, float]]]
    stop: StopRequest


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(
        method: str = "co_rewarding_ii",
        validate: Any = None,
        state: TrainerState | None = None,
        guard: Guard | None = None,
        on_row: Callable[[World, int], None] = lambda world, step: None,
        **changes: Any,
    ) -> World:
        changes = {"run_dir": tmp_path, "steps": 4, "validation.at_start": "false"} | changes
        actors, stop, rows = FakeActors([]), StopRequest(), list[tuple[int, dict[str, float]]]()
        saving, config = SavingFakes(actors.events), make_config(method, **changes)

        def record(step: int, row: dict[str, float]) -> None:
            actors.events.append(f"row {step}")
            rows.append((step, row))
            on_row(made, step)

        checkpoints = CheckpointWriter(
            config,
            saving,
            on_complete=lambda step: actors.events.append(f"complete {step}"),
            last_step=0 if state is None else state.step,
        )
        more = {
            "checkpoints": checkpoints,
            "stop": stop,
            "validate": None if validate is None else lambda num_updates, timer: validate(timer),
            "record": record,
            "notify": lambda text: actors.events.append(f"note {text}"),
        }
        more |= {} if state is None else {"state": state}
        more |= {} if guard is None else {"guard": guard}
        trainer, events, _, engines = make_trainer(method, actors=actors, more=more, **changes)
        made = World(trainer, events, actors, engines, saving, rows, stop)
        return made

    return make


def only(events: list[str], *words: str) -> list[str]:
    return [e for e in events if e.split()[0] in words]


def test_rows_come_before_the_checkpoints_that_cover_them_and_training_goes_on_meanwhile(
    world: Callable[..., World], tmp_path: Path
) -> None:
    w = world(**{"checkpoint.every": 2})
    w.trainer.train()
    assert only(w.events, "row", "begin", "saved", "complete", "update") == [
        *("update", "row 1", "update", "row 2", "begin save"),
        *("update", "row 3", "update", "row 4", "saved", "complete 2"),  # the next checkpoint waits for the one before
        *("begin save", "saved", "complete 4"),
    ]
    assert saved_steps(tmp_path) == [2, 4]


def test_a_checkpoint_whose_files_are_written_is_complete_at_the_next_step(world: Callable[..., World]) -> None:
    w = world(**{"checkpoint.every": 2})
    w.saving.slow = False
    w.trainer.train()
    assert only(w.events, "row", "complete")[:4] == ["row 1", "row 2", "row 3", "complete 2"]


def test_without_asynchronous_saving_a_checkpoint_is_complete_before_the_next_step(world: Callable[..., World]) -> None:
    w = world(**{"checkpoint.every": 2, "checkpoint.asynchronous": "false"})
    w.trainer.train()
    assert only(w.events, "row", "complete")[:4] == ["row 1", "row 2", "complete 2", "row 3"]


def test_accuracy_well_below_the_first_is_noticed_by_a_resumed_run_too(
    world: Callable[..., World], tmp_path: Path
) -> None:
    accuracies = iter([0.5, 0.41, 0.39, 0.45])
    options = {"validation.every": 1, "validation.at_start": "true", "checkpoint.every": 1, "checkpoint.keep": 9}
    w = world(validate=lambda timer: {"val/avg@8": next(accuracies)}, steps=3, **options)
    w.trainer.train()
    assert only(w.events, "row", "note") == [
        *("row 0", "row 1"),
        "note val/avg@8 is 39.0%, and was 50.0% at first: training makes the model worse on the validation questions",
        *("row 2", "row 3"),
    ]
    again = world(
        validate=lambda timer: {"val/avg@8": 0.3},
        steps=4,
        **options,
        state=check_checkpoint(checkpoint_path(tmp_path, 3)),
    )
    again.trainer.train()
    assert [e for e in again.events if "30.0%, and was 50.0%" in e]


def test_a_resumed_run_that_validates_in_another_way_begins_with_a_first_accuracy_of_its_own(
    world: Callable[..., World], tmp_path: Path
) -> None:
    """One greedy answer is not compared with the mean of eight random ones."""
    options = {"validation.every": 1, "checkpoint.every": 1, "checkpoint.keep": 9}
    w = world(validate=lambda timer: {"val/avg@8": 0.5}, steps=2, **options)
    w.trainer.train()
    greedy = iter([0.3, 0.25, 0.15])
    state = check_checkpoint(checkpoint_path(tmp_path, 2))
    assert (state.first_accuracy, state.first_metric) == (0.5, "val/avg@8")
    options["validation.samples"] = "greedy"
    again = world(validate=lambda timer: {"val/pass@1": next(greedy)}, steps=5, state=state, **options)
    again.trainer.train()
    assert only(again.events, "row", "note") == [
        *("row 3", "row 4"),
        "note val/pass@1 is 15.0%, and was 30.0% at first: training makes the model worse on the validation questions",
        "row 5",
    ]


def interrupt_sampling(w: World, role_version: int) -> None:
    sample = w.engines.sample

    def interrupted(requests: Any, version: int) -> list[list[Completion]]:
        if version == role_version:
            w.stop.signal = "SIGTERM"
            w.stop.check()
        return sample(requests, version)

    w.engines.sample = interrupted  # type: ignore[method-assign]


def test_a_stop_in_the_rollouts_saves_the_step_before_and_the_teacher_is_not_updated_twice(
    world: Callable[..., World], tmp_path: Path
) -> None:
    w = world()
    interrupt_sampling(w, role_version=4)  # the policy's rollouts of step 3, after the teacher's
    with pytest.raises(Preempted):
        w.trainer.train()
    assert [step for step, _ in w.rows] == [1, 2]
    trainer_state = check_checkpoint(checkpoint_path(tmp_path, 2))
    assert (trainer_state.step, trainer_state.num_updates, trainer_state.teacher_updates) == (2, 2, 3)

    again = world(state=trainer_state)
    again.trainer.train()
    assert [step for step, _ in again.rows] == [3, 4]
    assert len(only(w.events, "teacher")) + len(only(again.events, "teacher")) == 4


def interrupted(timer: PhaseTimer) -> dict[str, float]:
    """A validation in which the run is asked to stop."""
    stop = StopRequest()
    stop.signal = "SIGTERM"
    stop.check()
    return {}


def test_a_stop_in_the_validation_keeps_the_step_and_the_row_is_finished_later(
    world: Callable[..., World], tmp_path: Path
) -> None:
    options = {"validation.every": 2, "checkpoint.best_metric": "val/avg@8"}
    w = world(validate=interrupted, **options)
    with pytest.raises(Preempted):
        w.trainer.train()
    assert [step for step, _ in w.rows] == [1]
    trainer_state = check_checkpoint(checkpoint_path(tmp_path, 2))
    assert (trainer_state.step, trainer_state.num_updates) == (2, 2)
    assert trainer_state.unfinished_row is not None
    assert trainer_state.unfinished_row["optim/lr"] == 1.0

    again = world(validate=lambda timer: {"val/avg@8": 0.5}, **options, state=trainer_state)
    again.trainer.train()
    assert [step for step, _ in again.rows] == [2, 3, 4]
    assert again.rows[0][1]["val/avg@8"] == 0.5
    assert again.rows[0][1]["reward/mean"] == trainer_state.unfinished_row["reward/mean"]
    assert len(only(again.events, "update")) == 2
    last = check_checkpoint(checkpoint_path(tmp_path, 4))
    assert (last.score, last.score_metric) == (0.5, "val/avg@8")


def test_a_stop_in_the_last_validation_leaves_no_half_row_in_the_checkpoint(
    world: Callable[..., World], tmp_path: Path
) -> None:
    with pytest.raises(Preempted):
        world(validate=interrupted, **{"validation.every": 4}).trainer.train()
    stopped = check_checkpoint(checkpoint_path(tmp_path, 4))
    assert stopped.unfinished_row is not None
    again = world(validate=lambda timer: {"val/avg@8": 0.5}, **{"validation.every": 4}, state=stopped)
    again.trainer.train()
    assert [step for step, _ in again.rows] == [4]
    assert check_checkpoint(checkpoint_path(tmp_path, 4)).unfinished_row is None


def anchors_of(w: World, draw: Callable[[int], dict[str, float]]) -> list[tuple[int, int]]:
    """Lets the trainer draw anchors by `draw`; returns what it asks for: steps, and updates done."""
    asked: list[tuple[int, int]] = []

    def draw_anchors(step: int, num_updates: int, timer: PhaseTimer) -> dict[str, float]:
        asked.append((step, num_updates))
        return draw(step)

    w.trainer.draw_anchors = draw_anchors
    return asked


def test_anchors_are_drawn_after_the_update_and_the_guard_sees_them(world: Callable[..., World]) -> None:
    w = world()
    asked = anchors_of(w, lambda step: {"anchor/kept": 0.5} if step in (0, 2) else {})
    w.trainer.train()
    assert asked == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]
    assert [step for step, row in w.rows if "anchor/kept" in row] == [0, 2]
    assert w.trainer.guard.state_dict()["held"] == {"anchor/kept": 0.5}


def test_a_stop_while_anchors_are_drawn_keeps_the_step(world: Callable[..., World], tmp_path: Path) -> None:
    w = world()

    def interrupted(step: int) -> dict[str, float]:
        if step == 2:
            w.stop.signal = "SIGTERM"
            w.stop.check()
        return {}

    anchors_of(w, interrupted)
    with pytest.raises(Preempted):
        w.trainer.train()
    trainer_state = check_checkpoint(checkpoint_path(tmp_path, 2))
    assert trainer_state.unfinished_row is not None
    again = world(state=trainer_state)
    asked = anchors_of(again, lambda step: {"anchor/kept": 1.0})
    again.trainer.train()
    assert asked == [(2, 2), (3, 3), (4, 4)]
    assert again.rows[0][1]["anchor/kept"] == 1.0
    assert len(only(again.events, "update")) == 2


def test_a_stop_between_steps_saves_what_no_checkpoint_covers(world: Callable[..., World], tmp_path: Path) -> None:
    def stop_in_step_3(w: World, step: int) -> None:
        w.stop.signal = "SIGTERM" if step == 3 else None

    w = world(on_row=stop_in_step_3, **{"checkpoint.every": 2})
    with pytest.raises(Preempted):
        w.trainer.train()
    assert saved_steps(tmp_path) == [2, 3]


class Alarm(Guard):
    """Decides once what it was made for, whatever it sees."""

    def __init__(self, step: int, action: GuardAction) -> None:
        super().__init__(GuardSettings(action=action, warmup=1))
        self._at = step

    def observe(self, step: int, row: Mapping[str, float | None]) -> Decision:
        decision = super().observe(step, row)
        if step != self._at:
            return decision
        action = self._settings.action
        self._take(action, step)
        return replace(decision, level="act", action=action, good_step=step - 2, lasted=1, news=True)


def test_the_guard_s_state_is_saved(world: Callable[..., World], tmp_path: Path) -> None:
    w = world()
    w.trainer.train()
    saved = check_checkpoint(checkpoint_path(tmp_path, 4)).guard
    assert saved == w.trainer.guard.state_dict() != Guard(GuardSettings()).state_dict()


def test_a_raised_kl_weighs_more_from_the_next_step_on(world: Callable[..., World]) -> None:
    w = world(guard=Alarm(2, "raise_kl"))
    w.trainer.train()
    coefficients = [batch.kl_coef for batch in w.actors.batches]
    assert coefficients == pytest.approx([0.001, 0.001, 0.003, 0.003])
    assert any(event.startswith("note step 2: training may be collapsing") for event in w.events)


def test_a_frozen_teacher_is_updated_no_more(world: Callable[..., World]) -> None:
    w = world(guard=Alarm(2, "freeze_teacher"))
    w.trainer.train()
    assert only(w.events, "teacher")[2:] == ["teacher 1.0000"] * 2
    assert len(only(w.events, "update")) == 4


@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_collapse_ends_the_attempt_after_its_row_and_with_the_checkpoint_under_way(
    world: Callable[..., World], tmp_path: Path, action: GuardAction
) -> None:
    w = world(guard=Alarm(3, action), **{"checkpoint.every": 2})
    with pytest.raises(Collapsing) as collapse:
        w.trainer.train()
    assert collapse.value.decision.action == action
    assert [step for step, _ in w.rows] == [1, 2, 3]
    assert w.rows[2][1]["guard/level"] == 2.0
    assert saved_steps(tmp_path) == [2]


def test_a_full_disk_ends_the_run_and_names_the_checkpoints_that_are_whole(
    world: Callable[..., World], tmp_path: Path
) -> None:
    def fill_the_disk(w: World, step: int) -> None:
        w.saving.error = OSError(28, "No space left on device") if step == 4 else None

    w = world(on_row=fill_the_disk, **{"checkpoint.every": 2, "checkpoint.asynchronous": "false"})
    with pytest.raises(RunError, match="step 4 could not be written .*No space left.*; those of steps 2 are whole"):
        w.trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    check_checkpoint(checkpoint_path(tmp_path, 2))


def answering(w: World, **changes: Any) -> None:
    """All completions of the engines, changed."""
    w.engines._sample = lambda i, version: replace(FakeEngines._sample(i, version), **changes)  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["co_rewarding_i", "co_rewarding_ii", "majority_voting"])
def test_a_step_in_which_every_answer_is_empty_teaches_nothing_and_says_so(
    world: Callable[..., World], method: str
) -> None:
    w = world(method)
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    answering(w, text="", token_ids=nothing[0], logprobs=nothing[1])
    w.trainer.train()
    for batch in w.actors.batches:
        assert_harmless(batch)
    row = w.rows[0][1]
    assert row["reward/mean"] == 0
    assert row["rollout/response_tokens_mean"] == 0
    assert row["vote/no_answer_rate"] == 1


def test_a_step_in_which_every_rollout_is_cut_off_teaches_nothing_and_says_so(world: Callable[..., World]) -> None:
    w = world()
    answering(w, text="so we add", finish_reason="length")
    w.trainer.train()
    for batch in w.actors.batches:
        assert_harmless(batch)
    assert w.rows[0][1]["rollout/truncated_share"] == 1


def assert_harmless(batch: TrainBatch) -> None:
    assert np.isfinite(batch.token_weights).all()
    np.testing.assert_array_equal(batch.advantages, 0)


def skipping(w: World, steps: set[int]) -> None:
    update, calls = w.actors.update, iter(range(1, 100))
    w.actors.update = lambda batch: update(batch) | {"max:skipped": float(next(calls) in steps)}  # type: ignore[method-assign]


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run(world: Callable[..., World]) -> None:
    w = world(steps=6, **{"faults.max_skipped_updates": 2})
    skipping(w, {1, 2, 4, 5, 6})
    with pytest.raises(RunError, match="not finite in 3 steps in a row .*actor.lr"):
        w.trainer.train()
    assert [row["optim/skipped_updates"] for _, row in w.rows] == [1, 1, 0, 1, 1, 1]


def test_a_state_is_read_as_it_was_written(world: Callable[..., World], tmp_path: Path) -> None:
    w = world(steps=1)
    w.trainer.train()
    state = w.trainer.state
    expected = TrainerState(
        1,
        1,
        1,
        guard=w.trainer.guard.state_dict(),
        canary_limit=state.canary_limit,
        canary_allowed=state.canary_allowed,
    )
    assert check_checkpoint(checkpoint_path(tmp_path, 1)) == expected


@pytest.mark.parametrize("disk", ["has room again", "stays full"])
def test_a_step_that_the_disk_ended_leaves_no_checkpoint_half_written(
    world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    w = world(**{"checkpoint.every": 1})

    def full(step: int, timer: PhaseTimer) -> Any:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RunError("cannot write rollouts") from error

    steps = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda run, step, timer: (full if step == 2 else partial(steps, run))(step, timer)
    )
    if disk == "stays full":
        w.saving.error = RunError("finish_save: actor rank 0: No space left on device")
    with pytest.raises(RunError, match="cannot write rollouts"):
        w.trainer.train()
    assert saved_steps(tmp_path) == ([1] if disk == "has room again" else [])
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []
