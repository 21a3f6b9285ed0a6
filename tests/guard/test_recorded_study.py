"""The guard on the runs of the study of stability: silent on those that learn, early on those that collapse.

The tables are those that `demo --study stability` writes, with anchor/kept computed by today's rule from the draws that
the runs had kept. The limit of the anchors was chosen by seven of them. Three rules were decided when a run showed the
need: that anchors warn at once (majority voting on seed 3), that only right majorities are anchors of a method that
reads ground truths (ground_truth on seed 2), and that answers which the last draw has again are not lost (majority
voting at 5e-5). All of these are in CHOSEN_BY; the other runs had no part in anything.
"""

import pytest

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.demo.study_records import ACCURACY, Record, read_records
from megatron_coreward.guard import Decision, replay_rows
from tests.guard.rows import RECORDED

# Two runs were made again with twice the steps, because the guard warned of them and 225 steps did not say what of.
LONGER = {(record.name, record.seed): record for record in read_records(RECORDED / "longer")}
RECORDS = [LONGER.get((record.name, record.seed), record) for record in read_records(RECORDED / "stability")]
CHOSEN_BY = {  # name and seed
    ("ground_truth/lr-0.0001", 1),
    ("majority_voting/lr-0.0002", 1),
    ("majority_voting/lr-0.0002", 2),
    ("co_rewarding_i/lr-0.0002", 1),
    ("co_rewarding_ii/lr-0.0002", 1),
    ("self_certainty/lr-0.0001", 1),
    ("entropy/lr-0.0001", 1),
    ("majority_voting/lr-0.0002", 3),
    ("ground_truth/lr-0.0001", 2),
    ("majority_voting/lr-5e-05", 1),
}
# The fastest collapse: 10 points are lost at the validation of step 30, and the anchors drawn after step 32 show it.
LATE = {("self_certainty/lr-0.0001", 2): 2}  # steps
LOST = 0.1  # of the accuracy, below the best validation before: a run that loses as much has collapsed


def lost_at(record: Record) -> int | None:
    """The step of the first validation that is 10 points below an earlier one."""
    accuracy = record.series(ACCURACY)
    return next(
        (step for step in accuracy if accuracy[step] <= max(accuracy[s] for s in accuracy if s <= step) - LOST), None
    )


def decisions(record: Record) -> list[Decision]:
    return [decision for _, decision in replay_rows(GuardSettings(), [row for row in record.rows if row["step"] != 0])]


def first_warning(record: Record) -> int | None:
    return next((decision.step for decision in decisions(record) if decision.level != "none"), None)


def in_time(record: Record, warned: int, lost: int) -> bool:
    late = LATE.get((record.name, record.seed))
    return warned < lost if late is None else warned == lost + late


def named(records: list[Record]) -> list[object]:
    return [pytest.param(record, id=f"{record.name}-seed-{record.seed}") for record in records]


COLLAPSED = [record for record in RECORDS if lost_at(record) is not None]
HEALTHY = [record for record in RECORDS if lost_at(record) is None]


def test_the_study_has_both_kinds_of_runs() -> None:
    """By seed: of Co-rewarding-I at 2e-4 one stays and one falls."""
    assert {(record.name, record.seed) for record in COLLAPSED} >= {
        ("majority_voting/lr-0.0002", 1),
        ("majority_voting/lr-0.0002", 2),
        ("majority_voting/lr-0.0002", 3),
        ("co_rewarding_i/lr-0.0002", 2),
        ("entropy/lr-0.0001", 1),
        ("self_certainty/lr-0.0001", 1),
    }
    assert {(record.name, record.seed) for record in HEALTHY} >= {
        ("ground_truth/lr-0.0001", 1),
        ("co_rewarding_i/lr-0.0002", 1),
        ("co_rewarding_ii/lr-0.0002", 1),
        ("majority_voting/lr-0.0001", 1),
    }
    assert len(HEALTHY) >= 13


@pytest.mark.parametrize("record", named(HEALTHY))
def test_no_alarm_in_a_run_that_does_not_lose_what_it_has_learned(record: Record) -> None:
    assert first_warning(record) is None


@pytest.mark.parametrize("record", named(COLLAPSED))
def test_an_alarm_before_ten_points_of_accuracy_are_lost(record: Record) -> None:
    warned, lost = first_warning(record), lost_at(record)
    assert warned is not None
    assert lost is not None
    assert in_time(record, warned, lost)


def test_it_holds_on_runs_that_had_no_part_in_choosing_limits_and_rules() -> None:
    others = [record for record in RECORDS if (record.name, record.seed) not in CHOSEN_BY]
    assert len(RECORDS) - len(others) == len(CHOSEN_BY)
    collapsed = [record for record in others if lost_at(record) is not None]
    assert len(collapsed) >= 5
    assert len(others) - len(collapsed) >= 8
    for record in others:
        warned, lost = first_warning(record), lost_at(record)
        assert (warned is None) if lost is None else (warned is not None and in_time(record, warned, lost)), record.name


def test_what_it_warns_of_is_seen_in_longer_runs() -> None:
    """Co-rewarding-I on seed 3 lost less than 5 points in 225 steps, and 40 in the 225 after; majority voting at 5e-5
    moved nine of a hundred answers for two draws near step 210, had them again, and stayed where it was."""
    falls, stays = LONGER["co_rewarding_i/lr-0.0002", 3], LONGER["majority_voting/lr-5e-05", 1]
    accuracy = falls.series(ACCURACY)
    assert max(accuracy[step] for step in accuracy) - accuracy[225] < 0.05
    assert accuracy[450] < accuracy[225] - 0.4
    assert first_warning(falls) in range(150, 165)
    accuracy = stays.series(ACCURACY)
    assert all(accuracy[step] > accuracy[0] for step in accuracy if step > 0)
    assert first_warning(stays) is None


@pytest.mark.parametrize("record", named(RECORDS))
def test_the_number_of_anchors_that_these_runs_had_changes_no_decision(record: Record) -> None:
    """The tables do not have it: 64, and 55 at seed 2; 52, 38 and 49 right ones."""
    if record.name.startswith("ground_truth"):
        questions = {1: 52.0, 2: 38.0, 3: 49.0}[record.seed]
    else:
        questions = 55.0 if record.seed == 2 else 64.0
    rows = [r | {"anchor/questions": questions} for r in record.rows if r["step"] != 0]
    assert [decision for _, decision in replay_rows(GuardSettings(), rows)] == decisions(record)


def test_no_ground_truth_is_needed_for_it() -> None:
    for record in RECORDS:
        blind = [
            {key: value for key, value in row.items() if "accuracy" not in key and not key.startswith("val/")}
            for row in record.rows
            if row["step"] != 0
        ]
        assert [decision for _, decision in replay_rows(GuardSettings(), blind)] == decisions(record)


def test_without_anchors_the_rewards_of_certainty_collapse_unseen() -> None:
    """Why they are drawn: what else the guard reads shows these collapses too late, or never."""
    for record in COLLAPSED:
        if record.name.split("/")[0] in ("entropy", "self_certainty"):
            rows = [{k: v for k, v in row.items() if k != "anchor/kept"} for row in record.rows if row["step"] != 0]
            seen = next((d.step for _, d in replay_rows(GuardSettings(), rows) if d.level != "none"), 10_000)
            assert seen > (lost_at(record) or 0)
