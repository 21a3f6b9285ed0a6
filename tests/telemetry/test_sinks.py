import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.jsonl import read_rows
from megatron_coreward.telemetry.sinks import Sink, SinkGroup, TensorBoard, Wandb, open_sinks


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


class RecordingSink:
    def __init__(self, fail_on: str = "") -> None:
        self.calls: list[Any] = []
        self._fail_on = fail_on

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append((step, dict(metrics)))
        if self._fail_on == "write":
            raise OSError("disk full")

    def close(self) -> None:
        self.calls.append("close")
        if self._fail_on == "close":
            raise OSError("gone")


class FakeWandb(ModuleType):
    """Stands for the package: keeps what it was asked to do."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = __spec__  # find_spec asks a module in sys.modules for it
        self.inits: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **kwargs: Any) -> "FakeWandb":
        self.inits.append(kwargs)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, row: dict[str, float]) -> None:
        self.logged.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_writes_the_same_rows_to_the_metrics_file_and_to_tensorboard(tmp_path: Path) -> None:
    with open_sinks(tmp_path, first_step=0) as sinks:
        for step in (1, 2):
            sinks.write(step, {"step_time_s": 1.5, "reward/mean": step / 4})
    assert [row["reward/mean"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.25, 0.5]
    assert scalars(tmp_path / "tensorboard", "reward/mean") == [(1, 0.25), (2, 0.5)]


def test_a_row_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path)
    tracker.log(1, {"reward/mean": 0.5})
    assert scalars(tmp_path, "reward/mean") == [(1, 0.5)]
    tracker.finish()


def test_after_a_resume_every_reader_sees_one_history(tmp_path: Path) -> None:
    for first_step, value in ((0, 1.0), (3, 2.0)):
        with open_sinks(tmp_path, first_step=first_step) as sinks:
            for step in range(first_step, 6):
                sinks.write(step, {"step_time_s": 1.0, "reward/mean": value})
    expected = [(step, 1.0 if step < 3 else 2.0) for step in range(6)]
    assert [(row["step"], row["reward/mean"]) for row in read_rows(tmp_path / "metrics.jsonl")] == expected
    assert scalars(tmp_path / "tensorboard", "reward/mean") == expected


def test_the_sinks_do_not_import_torch() -> None:
    program = "import sys, megatron_coreward.telemetry.sinks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_an_error_of_a_sink_is_the_groups_and_every_sink_is_closed() -> None:
    first, broken, last = RecordingSink(), RecordingSink(fail_on="close"), RecordingSink(fail_on="write")
    sinks: list[Sink] = [first, broken, last]
    with pytest.raises(OSError, match="gone") as caught, SinkGroup(sinks) as group:
        group.write(1, {"step_time_s": 1.0})
    assert str(caught.value.__context__) == "disk full"
    assert [sink.calls[-1] for sink in (first, broken, last)] == ["close"] * 3


def test_wandb_without_its_package_is_bad_input_that_names_key_and_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"telemetry\.wandb_project is 'demo'.*megatron-coreward\[trackers\]"):
        open_sinks(tmp_path / "run", first_step=0, config={"telemetry": {"wandb_project": "demo"}})
    assert not (tmp_path / "run").exists()


def test_wandb_gets_every_row_over_our_own_step(tmp_path: Path, wandb: FakeWandb) -> None:
    config = {"seed": 1, "telemetry": {"wandb_project": "demo"}}
    with open_sinks(tmp_path, first_step=0, config=config) as sinks:
        sinks.write(3, {"step_time_s": 1.0, "reward/mean": 0.5})
    assert wandb.logged == [{"step_time_s": 1.0, "reward/mean": 0.5, "step": 3}]
    assert wandb.defined == [("step", None), ("*", "step")]
    assert wandb.finished == 1
    assert wandb.inits[0]["project"] == "demo"
    assert wandb.inits[0]["config"] == config


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        Wandb("demo", tmp_path / "a", {})
    Wandb("demo", tmp_path / "b", {})
    first, second, other = (init["id"] for init in wandb.inits)
    assert first == second != other
    assert {init["resume"] for init in wandb.inits} == {"allow"}
