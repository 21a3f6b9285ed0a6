"""What is recorded of a run comes back, and pictures and tables are made of it."""

import json
from pathlib import Path

import pytest

from megatron_coreward.config.methods import BUILT_IN
from megatron_coreward.demo import later_methods, rephrasings, stability, study_results
from megatron_coreward.demo.run import COMPARED
from megatron_coreward.demo.study_records import COLUMNS, read_records, record_run
from megatron_coreward.demo.study_results import (
    draw_methods,
    draw_rephrasing,
    draw_stability,
    end_of,
    methods_table,
    rephrasing_table,
    stability_lines,
    start_of,
)
from megatron_coreward.telemetry.bands import Panel

ACCURACY = [0.5, 0.6, 0.72, 0.6, 0.58]  # every 15 steps


def write_run(run_dir: Path, accuracy: list[float]) -> Path:
    run_dir.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "step_time_s": 1.0,
            "vote/share": 0.6 + step / 1000,
            "reward/mean": 0.123456789,
            "loss/kl": None,
            "time/update_s": 3.0,
        }
        | ({"val/avg@2": accuracy[step // 15]} if step % 15 == 0 else {})
        for step in range(15 * (len(accuracy) - 1) + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_a_record_has_four_digits_of_what_the_guard_and_people_read(tmp_path: Path) -> None:
    path = record_run(write_run(tmp_path / "run", ACCURACY), "entropy/lr-5e-05", 2, tmp_path / "recorded")
    assert path.name == "entropy--lr-5e-05--seed-2.csv.gz"
    (record,) = read_records(tmp_path / "recorded")
    assert (record.name, record.seed, len(record.rows)) == ("entropy/lr-5e-05", 2, 61)
    assert record.series("val/avg@2") == dict(zip(range(0, 61, 15), ACCURACY, strict=True))
    assert set(record.series("reward/mean").values()) == {0.1235}
    assert record.series("loss/kl") == {}
    assert set().union(*record.rows) <= set(COLUMNS)


def test_the_recorded_study_of_rephrasings_shows_what_its_page_says() -> None:
    """docs/rephrasing.md: damage costs accuracy, and the filter gives it back."""
    ends = {
        record.name: end_of(record)
        for record in read_records(Path(__file__).parent / "recorded" / "rephrasing")
        if record.seed == 1
    }
    assert {name: f"{value:.1%}" for name, value in ends.items() if "0.1" not in name} == {
        "damage-0": "59.7%",
        "damage-0.25": "55.0%",
        "damage-0.25-filtered": "59.1%",
        "damage-0.5": "54.8%",
        "damage-0.5-filtered": "59.2%",
    }


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", ACCURACY)
    first = record_run(run_dir, "entropy/lr-5e-05", 2, tmp_path / "a").read_bytes()
    assert record_run(run_dir, "entropy/lr-5e-05", 2, tmp_path / "b").read_bytes() == first


def test_the_table_of_stability_has_the_best_and_what_is_lost_of_it(tmp_path: Path) -> None:
    for arm, seed in (("majority_voting", 2), ("majority_voting", 1), ("ground_truth", 1)):
        name = stability.name_of(arm, 2e-4)
        record_run(write_run(tmp_path / arm / str(seed), ACCURACY), name, seed, tmp_path / "recorded")
    records = read_records(tmp_path / "recorded")
    lines = list(stability_lines(records))
    assert [line[:3] for line in lines] == [
        ("ground_truth", "0.0002", "1"),
        ("majority_voting", "0.0002", "1"),
        ("majority_voting", "0.0002", "2"),
    ]
    assert lines[0][3:] == ("50.0%", "72.0%", "30", "59.0%", "-13.0", "65%")
    assert draw_stability(records, tmp_path / "stability.png").stat().st_size > 10_000


def test_a_rate_that_is_none_of_the_study_s_own_is_in_the_table_at_its_place(tmp_path: Path) -> None:
    for rate in (2e-4, 3e-4, 5e-5):
        name = stability.name_of("entropy", rate)
        record_run(write_run(tmp_path / name, ACCURACY), name, 1, tmp_path / "recorded")
    records = read_records(tmp_path / "recorded")
    assert [line[1] for line in stability_lines(records)] == ["5e-05", "0.0002", "0.0003"]
    drawn: list[str] = []

    def draw(rows: list[list[Panel]], out: Path) -> Path:
        drawn.extend(row[0].title for row in rows)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_results, "draw_bands", draw)
        draw_stability(records, tmp_path / "stability.png")
    assert [title.rpartition(" ")[2] for title in drawn] == ["5e-05", "0.0002", "0.0003"]


def test_the_study_of_rephrasings_is_read_at_its_ends(tmp_path: Path) -> None:
    for share, filtered, last in ((0.0, False, 0.7), (0.5, False, 0.5), (0.5, True, 0.6)):
        name = rephrasings.name_of(share, filtered)
        record_run(write_run(tmp_path / name, [0.5, 0.6, last, last]), name, 1, tmp_path / "recorded")
    records = read_records(tmp_path / "recorded")
    assert {record.name: (start_of(record), end_of(record)) for record in records} == {
        "damage-0": (0.5, pytest.approx(0.7)),
        "damage-0.5": (0.5, pytest.approx(0.5)),
        "damage-0.5-filtered": (0.5, pytest.approx(0.6)),
    }
    assert draw_rephrasing(records, tmp_path / "rephrasing.png").stat().st_size > 5_000
    columns = {str(column.header): list(column.cells) for column in rephrasing_table(records).columns}
    assert columns["damaged"] == ["0%", "10%", "10%", "25%", "25%", "50%", "50%"]
    assert columns["seed 1"] == ["50.0% -> 70.0%", "-", "-", "-", "-", "50.0% -> 50.0%", "50.0% -> 60.0%"]


def test_the_study_of_methods_has_a_line_for_each_in_its_own_order(tmp_path: Path) -> None:
    for method in ("restrain", "random_reward"):
        record_run(write_run(tmp_path / method, ACCURACY), method, 1, tmp_path / "recorded")
    records = read_records(tmp_path / "recorded")
    columns = {str(column.header): list(column.cells) for column in methods_table(records).columns}
    assert columns["method"] == ["random_reward", "restrain"]
    assert (columns["first"][0], columns["last"][0], columns["change"][0]) == ("50.0%", "59.0%", "+9.0")
    assert draw_methods(records, tmp_path / "methods.png").stat().st_size > 5_000


def test_the_study_of_methods_has_every_built_in_one_that_the_paper_does_not_compare() -> None:
    assert {*later_methods.METHODS} == {*BUILT_IN} - {*COMPARED, "co_rewarding_i+ii_original"} | {"majority_voting"}
    later = {"random_reward", "self_harmony", "restrain", "scrl", "empo", "evol_rl", "confidence_voting"}
    assert {*later_methods.METHODS} == later | {"majority_voting"}
    assert [cell.name for cell in later_methods.cells()] == [*later_methods.METHODS]
