"""The teacher's decay runs from its start to its end along half a cosine."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.algorithms.ema_schedule import teacher_decay


def test_worked_values() -> None:
    assert teacher_decay(0, 100, 0.99, 0.9999) == pytest.approx(0.99, abs=1e-15)
    assert teacher_decay(50, 100, 0.99, 0.9999) == pytest.approx((0.99 + 0.9999) / 2)
    assert teacher_decay(100, 100, 0.99, 0.9999) == 0.9999
    assert teacher_decay(25, 100, 0.99, 0.9999) == pytest.approx(0.9999 - 0.5 * 0.0099 * (1 + math.sqrt(0.5)))


@given(st.integers(1, 10_000), st.data())
def test_the_decay_never_falls_and_stays_between_its_ends(total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    now, after = (teacher_decay(k, total, 0.99, 0.9999) for k in (step, step + 1))
    assert 0.99 - 1e-15 <= now <= after <= 0.9999


def test_a_prolonged_run_stays_at_the_end() -> None:
    assert teacher_decay(101, 100, 0.99, 0.9999) == teacher_decay(10**6, 100, 0.99, 0.9999) == 0.9999


def test_a_constant_decay_is_constant() -> None:
    assert {teacher_decay(k, 10, 0.5, 0.5) for k in range(11)} == {0.5}


@pytest.mark.parametrize(
    ("step", "total", "start", "end"), [(-1, 10, 0.9, 1), (0, 0, 0.9, 1), (0, 10, -0.1, 1), (0, 10, 0.9, 1.1)]
)
def test_impossible_schedules_are_refused(step: int, total: int, start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"need step|decays must lie"):
        teacher_decay(step, total, start, end)
