import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.errors import RunError
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.metrics import StepMetrics, reduce_values


def test_a_row_keeps_values_in_the_order_of_writing() -> None:
    metrics = StepMetrics(3)
    metrics.add("reward/mean", 0.5)
    metrics.update({"step_time_s": 2, "loss/kl": np.float32(0.25)})
    assert list(metrics.as_dict().items()) == [("reward/mean", 0.5), ("step_time_s", 2.0), ("loss/kl", 0.25)]


def test_a_row_is_a_copy() -> None:
    metrics = StepMetrics(1)
    metrics.as_dict()["reward/mean"] = 1.0
    assert metrics.as_dict() == {}


def test_a_key_written_twice_is_an_error_that_names_it() -> None:
    metrics = StepMetrics(7)
    metrics.add("reward/mean", 0.5)
    with pytest.raises(ValueError, match=r"reward/mean is written twice in step 7"):
        metrics.add("reward/mean", 0.5)


@pytest.mark.parametrize(
    "key", ["reward", "step", "/mean", "reward/", "Reward/mean", "reward/mean value", "reward//x", ""]
)
def test_a_key_that_is_not_area_and_name_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="expected area/name"):
        StepMetrics(1).add(key, 1.0)


@pytest.mark.parametrize(
    "key",
    [*(k for k in keys.MEANINGS if k != "step"), "val/pass@1", "val/math-500/avg@8", "time/rollout.sample_s"],
)
def test_every_documented_key_is_accepted(key: str) -> None:
    StepMetrics(1).add(key, 1.0)


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1.0), np.int64(1), np.array(1.0), torch.tensor(1.0)])
def test_every_kind_of_single_number_becomes_a_float_that_json_takes(value: float) -> None:
    metrics = StepMetrics(1)
    metrics.add("reward/mean", value)
    assert json.dumps(metrics.as_dict()) == '{"reward/mean": 1.0}'


@pytest.mark.parametrize("value", ["1.0", None, [1.0], np.ones(1), torch.ones(2), 1j])
def test_what_is_not_one_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="metric reward/mean: expected one number"):
        StepMetrics(1).add("reward/mean", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_ends_the_run_unless_it_is_to_be_kept(value: float) -> None:
    with pytest.raises(RunError, match=r"metric loss/policy is .* in step 4"):
        StepMetrics(4).add("loss/policy", value)
    kept = StepMetrics(4, non_finite="keep")
    kept.add("loss/policy", value)
    assert kept.as_dict()["loss/policy"] == pytest.approx(value, nan_ok=True)


def test_reductions_of_an_area_and_of_a_key_are_named_apart() -> None:
    assert reduce_values("reward", [0.0, 1.0, 1.0, 0.0], "mean", "std") == {"reward/mean": 0.5, "reward/std": 0.5}
    lengths = [[2, 4], [6, 20]]
    assert reduce_values("rollout/response_tokens", lengths, "mean", "min", "max", "sum", "median") == {
        "rollout/response_tokens_mean": 8.0,
        "rollout/response_tokens_min": 2.0,
        "rollout/response_tokens_max": 20.0,
        "rollout/response_tokens_sum": 32.0,
        "rollout/response_tokens_median": 5.0,
    }


def test_the_mean_of_nothing_is_no_metric() -> None:
    assert reduce_values("reward", [], "mean", "std") == {}


def test_the_mean_is_the_default_and_reduced_values_join_the_row() -> None:
    metrics = StepMetrics(1)
    metrics.add_reduced("reward", np.array([1.0, 3.0], dtype=np.float32))
    assert metrics.as_dict() == {"reward/mean": 2.0}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_reductions_lie_between_the_least_and_the_greatest_value(values: list[float]) -> None:
    reduced = reduce_values("a", values, "min", "mean", "median", "max")
    slack = 1e-9 * max(map(abs, values))
    for way in ("mean", "median"):
        assert reduced["a/min"] - slack <= reduced[f"a/{way}"] <= reduced["a/max"] + slack


def test_validation_keys_are_ordered_by_measure_and_then_by_k() -> None:
    unordered = ["val/maj@8", "reward/mean", "val/avg@16", "val/seconds", "val/pass@1", "val/avg@8"]
    assert keys.validation_keys(unordered) == ["val/pass@1", "val/avg@8", "val/avg@16", "val/maj@8", "val/seconds"]
