"""The guard's promises: the same rows give the same decisions, nothing alarms early or alone, actions end."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_coreward.config.guard import GuardAction, GuardSettings
from megatron_coreward.guard import Decision, Guard, replay_rows
from megatron_coreward.guard.indicators import METRICS
from megatron_coreward.telemetry.jsonl import Row
from tests.guard.rows import CHANGE, DAMAGE, SIGNS, row

# A window of one step, so that a test's rows are what the guard sees.
QUICK: dict[str, Any] = {"warmup": 3, "window": 1, "warn_after": 2, "act_after": 4, "cooldown": 3}

# Indicators of damage that come and go with single rows, and of which one alone is no alarm.
NOT_ENOUGH = [name for name in DAMAGE if name not in ("entropy_rise", "anchors")]

values = st.one_of(st.none(), st.floats(0, 10, allow_nan=False), st.just(math.nan))
histories = st.lists(st.dictionaries(st.sampled_from(METRICS), values), max_size=40)
actions = st.sampled_from(["off", "warn", "raise_kl", "freeze_teacher", "rollback", "stop"])
quick_settings = st.builds(
    lambda action, window, warmup: GuardSettings(**{**QUICK, "action": action, "window": window, "warmup": warmup}),
    actions,
    st.integers(1, 4),
    st.integers(1, 5),
)


def run(settings: GuardSettings, rows: list[Row], rollbacks: int = 0) -> list[Decision]:
    guard = Guard(settings, rollbacks)
    return [guard.observe(int(r["step"] or 0), r) for r in rows]


def rows_with(indicators: tuple[str, ...], steps: int, steady: int = 3) -> list[Row]:
    return [row(step, *(indicators if step > steady else ())) for step in range(1, steady + steps + 1)]


def drawn_at(kept: dict[int, float], steps: int) -> list[Row]:
    """A steady policy whose anchors are drawn at these steps alone."""
    rows = [{key: value for key, value in row(step).items() if key != "anchor/kept"} for step in range(1, steps + 1)]
    for step, value in kept.items():
        rows[step - 1]["anchor/kept"] = value
    return rows


def levels(decisions: list[Decision]) -> list[str]:
    return [decision.level for decision in decisions]


def test_two_indicators_with_damage_warn_when_they_last_and_act_when_they_go_on() -> None:
    decisions = run(GuardSettings(**QUICK), rows_with(("kl", "length"), 6))
    assert levels(decisions) == ["none"] * 4 + ["warn", "warn", "act", "act", "act"]
    assert [decision.news for decision in decisions] == [False] * 4 + [True, False, True, False, False]
    assert [decision.action for decision in decisions] == [None] * 6 + ["warn", None, None]
    assert decisions[6].good_step == 3
    assert str(decisions[6]) == (
        "step 7: training may be collapsing: response length 200 -> 20 tokens (limit -25%); "
        "KL to the reference 5 nats a token (limit 0.1); for 4 steps."
    )
    assert decisions[6].metrics() == {"guard/level": 2.0, "guard/indicators": 2.0}


def test_anchors_that_go_are_an_alarm_by_themselves_and_hold_until_they_are_drawn_again() -> None:
    decisions = run(GuardSettings(**QUICK), drawn_at({4: 0.6, 9: 0.95}, 12))
    assert levels(decisions) == ["none"] * 3 + ["warn"] * 5 + ["none"] * 4
    assert [decision.news for decision in decisions] == [False] * 3 + [True] + [False] * 8
    assert "answers to the anchor questions kept to 60% (limit -9%)" in decisions[3].reason


def test_anchors_alone_are_acted_on_after_a_second_draw_and_go_back_to_before_the_two_of_the_first() -> None:
    settings = GuardSettings(**QUICK, action="stop", anchor_every=6)
    decisions = run(settings, drawn_at({24: 0.6, 30: 0.6}, 30))
    assert levels(decisions) == ["none"] * 23 + ["warn"] * 6 + ["act"]
    assert (decisions[-1].action, decisions[-1].lasted, decisions[-1].good_step) == ("stop", 7, 24 - 2 * 6)
    with_others = [r | row(r["step"], "kl", "length") if r["step"] >= 24 else r for r in drawn_at({24: 0.6}, 27)]  # type: ignore[operator,arg-type]
    for r in with_others[24:]:
        r.pop("anchor/kept")
    assert levels(run(settings, with_others))[-1] == "act"  # others need no draw


def test_alarms_with_a_short_gap_are_one_episode_and_what_is_older_is_good() -> None:
    settings = GuardSettings(**QUICK, anchor_every=6)
    gap = drawn_at({24: 0.6, 30: 0.95, 36: 0.6, 42: 0.6}, 42)
    assert run(settings, gap)[-1].good_step == 24 - 2 * 6
    far = drawn_at({24: 0.6, 30: 0.95, 60: 0.6, 66: 0.6}, 66)
    assert run(settings, far)[-1].good_step == 60 - 2 * 6


def test_after_an_action_what_anchors_showed_before_is_forgotten() -> None:
    settings = GuardSettings(**QUICK, action="raise_kl", anchor_every=6)
    decisions = run(settings, drawn_at({6: 0.6, 12: 0.6, 60: 0.6}, 61))
    assert [decision.step for decision in decisions if decision.action] == [12]
    assert {decision.level for decision in decisions[12:59]} == {"none"}
    assert decisions[59].level == "warn"


def test_what_appears_late_is_compared_with_its_own_first_steps() -> None:
    rows = rows_with((), 20)
    for place, flips in enumerate([None] * 5 + [0.3] * 6 + [0.01] * 12):
        rows[place]["label/flip_rate"] = flips
    named = {d.step: [indicator.name for indicator in d.indicators] for d in run(GuardSettings(**QUICK), rows)}
    assert [step for step, names in named.items() if names] == list(range(12, 24))
    assert named[12] == ["locking"]


@pytest.mark.parametrize("name", [name for name in SIGNS if name != "anchors"])
def test_one_sign_alone_is_no_alarm(name: str) -> None:
    decisions = run(GuardSettings(**QUICK), rows_with((name,), 20))
    assert set(levels(decisions)) == {"none"}
    assert [indicator.name for indicator in decisions[-1].indicators] == [name]


def test_certainty_and_distance_together_are_no_alarm_for_learning_shows_them_too() -> None:
    assert set(levels(run(GuardSettings(**QUICK), rows_with(CHANGE, 20)))) == {"none"}


@given(
    st.sets(st.sampled_from(NOT_ENOUGH), min_size=2),
    st.integers(1, 9),
)
def test_indicators_that_do_not_last_are_no_alarm(indicators: set[str], pause: int) -> None:
    rows = [row(step, *(sorted(indicators) if step % 2 and step > 3 + pause else ())) for step in range(1, 40)]
    assert set(levels(run(GuardSettings(**QUICK), rows))) == {"none"}


@given(quick_settings, histories)
def test_no_alarm_in_the_warm_up_nor_sooner_than_patience(settings: GuardSettings, history: list[Row]) -> None:
    rows: list[Row] = [{"step": step, **values} for step, values in enumerate(history, start=1)]
    decisions = run(settings, rows)
    assert set(levels(decisions[: settings.warmup])) <= {"none"}
    for decision in decisions[settings.warmup : settings.warmup + settings.warn_after - 1]:
        assert decision.level == "none" or any(indicator.enough for indicator in decision.indicators)
    for decision in decisions:
        if decision.level != "none":
            enough = any(indicator.enough for indicator in decision.indicators)
            assert len(decision.indicators) >= settings.min_indicators or enough
            assert any(indicator.damage for indicator in decision.indicators)
            assert 0 <= decision.good_step < decision.step - decision.lasted + 1


@given(quick_settings, histories, st.data())
def test_a_guard_that_is_saved_and_loaded_decides_as_one_that_went_on(
    settings: GuardSettings, history: list[Row], data: st.DataObject
) -> None:
    rows: list[Row] = [{"step": step, **values} for step, values in enumerate(history, start=1)]
    cut = data.draw(st.integers(0, len(rows)))
    whole, first, second = Guard(settings), Guard(settings), Guard(settings)
    expected = [whole.observe(int(r["step"] or 0), r) for r in rows]
    found = [first.observe(int(r["step"] or 0), r) for r in rows[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [second.observe(int(r["step"] or 0), r) for r in rows[cut:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()
    assert (second.kl_factor, second.teacher_frozen) == (whole.kl_factor, whole.teacher_frozen)


@given(quick_settings, histories)
def test_a_replay_of_the_rows_is_the_run(settings: GuardSettings, history: list[Row]) -> None:
    rows: list[Row] = [{"step": step, **values} for step, values in enumerate(history, start=1)]
    stored = json.loads(
        json.dumps([{k: v if v is None or math.isfinite(v) else None for k, v in r.items()} for r in rows])
    )
    assert [decision for _, decision in replay_rows(settings, stored)] == run(settings, rows)


@given(histories, st.floats(0, 1), st.floats(0, 1))
def test_ground_truths_and_validation_change_no_decision(history: list[Row], accuracy: float, val: float) -> None:
    rows: list[Row] = [{"step": step, **values} for step, values in enumerate(history, start=1)]
    labelled: list[Row] = [
        {**r, "label/accuracy": accuracy, "rollout/accuracy": accuracy, "val/avg@8": val} for r in rows
    ]
    assert run(GuardSettings(**QUICK), rows) == run(GuardSettings(**QUICK), labelled)
    assert not any("accuracy" in key or key.startswith("val/") for key in METRICS)


def test_off_sees_nothing() -> None:
    decisions = run(GuardSettings(**QUICK, action="off"), rows_with(("kl", "length"), 20))
    assert set(levels(decisions)) == {"none"}
    assert not any(decision.news for decision in decisions)


def test_the_kl_weight_rises_by_its_factor_after_each_cooldown_until_the_actions_are_used_up() -> None:
    settings = GuardSettings(**QUICK, action="raise_kl", kl_factor=2.0, max_actions=2)
    guard, factors, acted = Guard(settings), [], []
    for r in rows_with(("kl", "length"), 40):
        decision = guard.observe(int(r["step"] or 0), r)
        factors.append(guard.kl_factor)
        if decision.action:
            acted.append((decision.step, decision.action))
    # Signs from step 4 on: at 7; quiet to 10, at 14; quiet to 17, at 21 nothing is left to do.
    assert acted == [(7, "raise_kl"), (14, "raise_kl"), (21, "warn")]
    assert factors[5:7] == [1.0, 2.0]
    assert factors[-1] == 4.0


def test_the_teacher_is_frozen_once() -> None:
    guard = Guard(GuardSettings(**QUICK, action="freeze_teacher"))
    decisions = [guard.observe(int(r["step"] or 0), r) for r in rows_with(("kl", "length"), 30)]
    assert [d.action for d in decisions if d.action] == ["freeze_teacher", "warn"]
    assert guard.teacher_frozen


@pytest.mark.parametrize(
    ("rollbacks", "action", "factor"), [(0, "rollback", 1.0), (1, "rollback", 3.0), (2, "stop", 9.0)]
)
def test_a_run_that_went_back_often_enough_is_stopped(rollbacks: int, action: GuardAction, factor: float) -> None:
    settings = GuardSettings(**QUICK, action="rollback", max_actions=2)
    guard = Guard(settings, rollbacks)
    assert guard.kl_factor == factor
    decisions = [guard.observe(int(r["step"] or 0), r) for r in rows_with(("kl", "length"), 4)]
    assert decisions[-1].action == action
    assert decisions[-1].good_step == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"action": "panic"},
        {"min_indicators": 1},
        {"kl_factor": 1.0},
        {"warn_after": 12},
        {"length_fall": 1.5},
        {"pace": 1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GuardSettings(**wrong)
