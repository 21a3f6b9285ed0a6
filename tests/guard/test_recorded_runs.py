"""The guard on runs that were recorded: silent where training went well, loud where accuracy was lost.

Rows are those of whole runs of the demo, reduced to what the guard reads and to four digits, with the validation
accuracy beside them. Regenerate by running the demo with the settings that each file names.
"""

import pytest

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.guard import replay_rows
from tests.guard.rows import RECORDED, recorded

HEALTHY = [f"healthy_{method}_seed{seed}" for method in ("i", "ii") for seed in (1, 2, 3)]


@pytest.mark.parametrize("name", HEALTHY)
def test_no_sign_at_all_in_runs_that_learn(name: str) -> None:
    _, rows = recorded(name)
    accuracy = [row["val/avg@8"] for row in rows if "val/avg@8" in row]
    assert accuracy[-1] is not None
    assert accuracy[0] is not None
    assert accuracy[-1] > accuracy[0]
    assert [decision.indicators for _, decision in replay_rows(GuardSettings(), rows) if decision.indicators] == []


@pytest.mark.parametrize("name", HEALTHY)
def test_runs_that_learn_stay_silent_with_every_limit_a_fifth_tighter(name: str) -> None:
    _, rows = recorded(name)
    default = GuardSettings()
    tight = GuardSettings(
        consensus=0.8 * default.consensus,
        entropy_fall=0.8 * default.entropy_fall,
        kl=0.8 * default.kl,
        length_fall=0.8 * default.length_fall,
        variety_fall=0.8 * default.variety_fall,
        no_answer_rise=0.8 * default.no_answer_rise,
        truncated_rise=0.8 * default.truncated_rise,
        entropy_rise=0.8 * default.entropy_rise,
        agreement_fall=0.8 * default.agreement_fall,
        label_flips=0.8 * default.label_flips,
    )
    assert {decision.level for _, decision in replay_rows(tight, rows)} == {"none"}


@pytest.mark.parametrize(
    ("name", "warned", "acted", "indicators"),
    [
        ("collapse_slow", 34, 39, {"kl", "label_flips"}),  # avg@8: 51% at the start, 22% after 60 steps
        ("collapse_fast", 23, 28, {"kl", "label_flips"}),  # every question is answered with 70 after 50 steps
    ],
)
def test_an_alarm_where_majority_voting_loses_accuracy(
    name: str, warned: int, acted: int, indicators: set[str]
) -> None:
    _, rows = recorded(name)
    decisions = [decision for _, decision in replay_rows(GuardSettings(), rows)]
    assert next(decision.step for decision in decisions if decision.level == "warn") == warned
    first = next(decision for decision in decisions if decision.level == "act")
    assert first.step == acted
    assert {indicator.name for indicator in first.indicators} >= indicators
    assert decisions[-1].level == "act"


def test_a_collapse_to_one_answer_is_seen_without_a_second_epoch() -> None:
    """Labels that flip are only known where questions come again."""
    _, rows = recorded("collapse_fast")
    single = [{key: value for key, value in row.items() if key != "label/flip_rate"} for row in rows]
    first = next(decision for _, decision in replay_rows(GuardSettings(), single) if decision.level == "act")
    assert first.step < 40
    assert {indicator.name for indicator in first.indicators} >= {"kl", "variety"}


def test_every_recording_is_tested() -> None:
    assert sorted(path.stem for path in RECORDED.glob("*.json")) == sorted([*HEALTHY, "collapse_slow", "collapse_fast"])
