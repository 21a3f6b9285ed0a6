"""A forecast reads the collapse of a short run at a high rate and says how far a planned run may go."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.errors import HaltedError, InputError
from megatron_coreward.trainer.forecast import FEWEST_CLEAR, Forecast, describe, forecast, rate_sum
from tests.trainer.fakes import make_config

Load = Callable[[Sequence[str]], RunConfig]


def loader(tmp_path: Path, method: str = "co_rewarding_i", **changes: object) -> Load:
    def load(overrides: Sequence[str]) -> RunConfig:
        pairs = dict(override.split("=", 1) for override in overrides)
        return make_config(method, **({"run_dir": tmp_path / "run", **changes} | pairs))

    return load


class Run:
    """Writes the metrics of a run whose anchors begin to go at a step, and is stopped as the guard would."""

    def __init__(self, falls_at: int | None, questions: int = 64, passes: tuple[int, ...] = ()) -> None:
        self.falls_at, self.questions, self.passes = falls_at, questions, passes
        self.configs: list[RunConfig] = []

    def __call__(self, config: RunConfig) -> None:
        self.configs.append(config)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "config.yaml").write_text(dump_config(config))
        rows = [{"step": 0, "step_time_s": 1.0, "anchor/questions": self.questions, "anchor/kept": 1.0}]
        for step in range(1, config.steps + 1):
            gone = self.falls_at is not None and step >= self.falls_at
            rows.append({"step": step, "step_time_s": 1.0})
            if step % config.guard.anchor_every == 0:
                rows[-1]["anchor/kept"] = 0.5 if gone else 1.0
            if self.passes is not None and step in self.passes:
                rows[-1]["anchor/kept"] = 0.5
            if gone and step >= (self.falls_at or 0) + config.guard.act_after + 3:
                break
        (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.falls_at is not None:
            raise HaltedError("training may be collapsing")


def test_the_short_run_is_the_planned_one_at_a_higher_rate_without_ground_truths(tmp_path: Path) -> None:
    run = Run(falls_at=None)
    planned = {"actor.lr": 1e-6, "data.val_files": "[held_out.parquet]", "checkpoint.best_metric": "val/avg@8"}
    forecast(loader(tmp_path, steps=500, **planned), run, factor=4, steps=50)
    (config,) = run.configs
    assert (config.run_dir, config.steps, config.actor.lr) == (tmp_path / "run" / "forecast", 50, 4e-6)
    assert (config.actor.lr_schedule, config.actor.lr_warmup, config.guard.action) == ("constant", 0, "stop")
    assert config.data.val_files == ()
    assert list(setting_problems(config)) == []
    assert config.guard.anchors > 0


@pytest.mark.parametrize(
    ("falls_at", "planned_steps", "safe", "said"),
    [
        (None, 100, 100, "train as planned: the short run went as far as the plan does"),
        (None, 1000, 200, "200 of the 1000 planned steps are as far as the short run went, without a collapse"),
        (24, 80, 80, "train as planned: the short run collapsed later than the plan goes"),
        (24, 150, 92, "92 of the 150 planned steps are as far as the short run went before it collapsed; a lower rate"),
        (24, 1000, 92, "do not train this model on its own labels as planned: 92 of the 1000"),
    ],
)
def test_how_far_a_plan_is_safe_is_read_from_the_sum_of_rates(
    tmp_path: Path, falls_at: int | None, planned_steps: int, safe: int, said: str
) -> None:
    constant = {"actor.lr": 1e-6, "actor.lr_schedule": "constant", "actor.lr_warmup": 0}
    found = forecast(loader(tmp_path, steps=planned_steps, **constant), Run(falls_at), factor=4, steps=50)
    assert found.collapse_step == falls_at
    assert found.borne_sum == pytest.approx(4e-6 * (50 if falls_at is None else falls_at - 1))
    assert found.planned_sum == pytest.approx(planned_steps * 1e-6)
    assert found.safe_steps == pytest.approx(safe, abs=1)
    assert said in found.recommendation
    assert found.recommendation in describe(found, tmp_path / "report.html")


def test_a_short_run_that_the_guard_has_stopped_leaves_its_report_too(tmp_path: Path) -> None:
    said: list[str] = []
    forecast(loader(tmp_path), Run(falls_at=20), steps=30, notify=said.append)
    assert said == []
    assert "anchor" in (tmp_path / "run" / "forecast" / "report.html").read_text()


def test_a_second_forecast_replaces_the_first(tmp_path: Path) -> None:
    load = loader(tmp_path)
    assert forecast(load, Run(falls_at=None), steps=30).collapse_step is None
    assert forecast(load, Run(falls_at=20), steps=30).collapse_step == 20


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [("constant", 0.0, 10.0), ("constant", 0.2, 9.0), ("cosine", 0.0, 5.0), ("linear", 0.2, 5.0)],
)
def test_the_sum_of_rates_follows_the_schedule(schedule: str, warmup: float, expected: float) -> None:
    config = make_config(steps=10, **{"actor.lr": 1.0, "actor.lr_schedule": schedule, "actor.lr_warmup": warmup})
    assert rate_sum(config) == pytest.approx(expected)


def test_a_model_that_is_sure_of_nothing_has_no_forecast(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found 5 anchor questions, on which the model has a clear majority"):
        forecast(loader(tmp_path), Run(falls_at=None, questions=5))


def test_ground_truths_need_no_forecast_in_a_mixture_neither(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="method: found ground_truth, which reads ground truths"):
        forecast(loader(tmp_path, "ground_truth"), Run(falls_at=None))
    mixed = loader(tmp_path)(()).model_copy(update={"method": {"majority_voting": 1.0, "ground_truth": 0.1}})
    with pytest.raises(InputError, match="0.1 x ground_truth, which reads ground truths"):
        forecast(lambda overrides: mixed, Run(falls_at=None))


def test_a_warning_that_passes_is_no_collapse_and_one_that_is_there_at_the_end_is(tmp_path: Path) -> None:
    load = loader(tmp_path)
    assert forecast(load, Run(falls_at=None, passes=(20,)), steps=50).collapse_step is None
    assert forecast(load, Run(falls_at=None, passes=(20, 48)), steps=50).collapse_step == 48


def test_what_is_borne_and_what_is_planned_are_both_counted_in_optimizer_steps(tmp_path: Path) -> None:
    constant = {"actor.lr": 1e-6, "actor.lr_schedule": "constant", "actor.lr_warmup": 0}
    shares = []
    for updates in (1, 2):
        load = loader(tmp_path, steps=200, **constant, **{"loss.updates_per_batch": updates})
        found = forecast(load, Run(falls_at=24), factor=4, steps=50)
        assert found.planned_sum == pytest.approx(updates * 200 * 1e-6)
        assert found.borne_sum == pytest.approx(updates * 23 * 4e-6)
        shares.append(found.share)
    assert shares[0] == pytest.approx(shares[1])


def test_the_short_run_ends_before_its_first_step_without_enough_anchors(tmp_path: Path) -> None:
    run = Run(falls_at=None)
    forecast(loader(tmp_path), run)
    assert run.configs[0].guard.min_anchors == FEWEST_CLEAR <= run.configs[0].guard.anchors


def test_shares_and_steps_are_those_of_the_planned_run() -> None:
    found = Forecast(21, 30, 4e-6, 200, 2e-4, 0.7, "anchors")
    assert found.share == pytest.approx(0.4)
    assert found.safe_steps == pytest.approx(80, abs=1)
