import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.display import (
    HEADLINE,
    Kind,
    format_seconds,
    format_value,
    phase_seconds,
    sparkline,
)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.6316, "share", "63.2%"),
        (12345.6, "count", "12,346"),
        (0.12345, "number", "0.123"),
        (0.000321, "small", "3.2e-04"),
        (math.nan, "number", "nan"),
        (math.inf, "count", "inf"),
    ],
)
def test_numbers_read_as_their_kind(value: float, kind: Kind, text: str) -> None:
    assert format_value(value, kind) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (362, "6m 02s"),
        (3599.6, "1h 00m"),
        (3780, "1h 03m"),
    ],
)
def test_seconds_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_sparkline_goes_from_the_least_to_the_greatest_value() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([5.0, math.nan, 5.0]) == "▄ ▄"
    assert sparkline([math.nan]) == " "
    assert sparkline([]) == ""


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True)))
def test_a_sparkline_has_one_character_for_each_value(values: list[float]) -> None:
    assert len(sparkline(values)) == len(values)


def test_phases_come_in_the_order_of_the_step_without_those_that_took_no_time() -> None:
    metrics = {
        "time/outside_s": 0.5,
        "time/update_s": 2.0,
        "time/sync_s": 0.0,
        "time/rollout_s": 1.0,
        "step_time_s": 3.5,
    }
    assert phase_seconds(metrics) == [("rollout", 1.0), ("update", 2.0), ("outside", 0.5)]


def test_the_short_list_shows_documented_metrics_only() -> None:
    assert {shown.key for shown in HEADLINE} <= set(keys.MEANINGS)
