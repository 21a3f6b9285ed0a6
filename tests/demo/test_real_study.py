"""One cell of a study and one forecast for real: processes, engines, anchors, and what is left behind."""

from pathlib import Path

import pytest

from megatron_coreward.cli import main
from megatron_coreward.config.load import dump_config
from megatron_coreward.demo import run as demo_run
from megatron_coreward.demo import stability, study
from megatron_coreward.demo.study import Cell
from megatron_coreward.demo.study_records import read_records, record_run
from megatron_coreward.demo.study_results import show
from megatron_coreward.report.report import write_report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cell_is_run_recorded_and_drawn_and_a_forecast_reads_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_run, "MAX_SFT_STEPS", 150)  # enough to write sums, not to be right about them
    cell = Cell(
        stability.name_of("majority_voting", 1e-4),
        1,
        "majority_voting",
        (*stability.SETTINGS, "steps=4", "guard.anchor_every=2", "validation.every=4", "telemetry.console=off"),
    )
    (run_dir,) = study.run_cells(tmp_path, stability.STUDY, [cell])
    assert cell.is_done(tmp_path, stability.STUDY)
    record_run(run_dir, cell.name, cell.seed, tmp_path / "recorded")
    (record,) = read_records(tmp_path / "recorded")
    assert sorted(record.series("vote/entropy")) == [1, 2, 3, 4]
    assert sorted(record.series("val/avg@2")) == [0, 4]
    anchors = record.series("anchor/kept")
    assert not anchors or (sorted(anchors) == [0, 2, 4] and anchors[0] == 1)  # a weak model may be sure of nothing
    assert show(stability.STUDY, tmp_path / "recorded", tmp_path / "stability.png").stat().st_size > 10_000
    assert write_report(run_dir).is_file()

    config = study.cell_config(demo_run.Console(), tmp_path, cell, tmp_path / "planned")
    recipe = tmp_path / "planned.yaml"
    recipe.write_text(dump_config(config))
    status = main(["forecast", str(recipe), "--steps", "20", "steps=40", "guard.anchors=64"])
    said = capsys.readouterr()
    assert (status == 0 and "recommendation: " in said.out) or (status == 2 and "clear majority" in said.err)
    assert (tmp_path / "planned" / "forecast" / "anchors.jsonl").is_file()
