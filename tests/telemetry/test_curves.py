import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry import curves, keys
from megatron_coreward.telemetry.curves import draw_comparison, draw_run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look inside."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def write_run(run_dir: Path, rows: list[dict[str, float | None]]) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def full_rows(steps: int) -> list[dict[str, float | None]]:
    rows: list[dict[str, float | None]] = [{"step": 0, "step_time_s": 3.0, "val/avg@8": 0.5, "val/pass@1": 0.48}]
    for step in range(1, steps + 1):
        row: dict[str, float | None] = {**dict.fromkeys(keys.MEANINGS, 0.1 + 0.01 * step), "step": step}
        if step % 5 == 0:
            row |= {"val/avg@8": 0.5 + step / 100, "val/pass@1": 0.48}
        rows.append(row)
    return rows


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize("steps", [1, 120])
def test_a_full_run_gives_one_picture_with_every_panel(tmp_path: Path, drawn: list[Figure], steps: int) -> None:
    run_dir = write_run(tmp_path / "run", full_rows(steps))
    path = draw_run(run_dir)
    assert path == run_dir / "curves.png"
    height, width, _ = imread(path).shape
    assert height > 1000
    assert width > 1500
    assert titles(drawn[0]) == [
        "Validation accuracy",
        "Reward",
        "Pseudo-labels",
        "Response length (tokens)",
        "Unusable rollouts and votes",
        "Policy entropy (nats)",
        "KL to the reference (nats)",
        "Log-probability gap, engine to actor (nats)",
        "Time of a step (s)",
    ]
    assert [entry.name for entry in sorted(run_dir.iterdir())] == ["curves.png", "metrics.jsonl"]


def test_a_curve_shows_the_numbers_of_the_file(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_run(write_run(tmp_path / "run", full_rows(10)))
    line = next(line for line in drawn[0].axes[0].lines if line.get_label() == "avg@8")
    np.testing.assert_allclose(np.asarray(line.get_xydata()), [(0, 0.5), (5, 0.55), (10, 0.6)])


def test_panels_without_their_metrics_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    rows: list[dict[str, float | None]] = [{"step": 1, "step_time_s": 1.0, "reward/mean": 0.5, "loss/kl": None}]
    draw_run(write_run(tmp_path / "run", rows))
    assert titles(drawn[0]) == ["Reward", "Time of a step (s)"]


def test_the_validation_before_training_alone_can_be_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_run(write_run(tmp_path / "run", full_rows(0)))
    assert titles(drawn[0]) == ["Validation accuracy"]


def test_a_gap_stays_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    rows: list[dict[str, float | None]] = [
        {"step": step, "step_time_s": 1.0, "loss/kl": None if step == 2 else 0.1, "sync/logprob_gap": 0.0}
        for step in (1, 2, 3)
    ]
    draw_run(write_run(tmp_path / "run", rows))
    values = np.asarray(drawn[0].axes[titles(drawn[0]).index("KL to the reference (nats)")].lines[0].get_ydata())
    assert [math.isnan(value) for value in values] == [False, True, False]
    gap = drawn[0].axes[titles(drawn[0]).index("Log-probability gap, engine to actor (nats)")]
    assert gap.get_yscale() == "linear"


@pytest.mark.parametrize("text", [None, "", '{"step": 0, "step_time_s": 1.0}\n'])
def test_a_run_without_metrics_is_bad_input_that_names_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        draw_run(tmp_path)


def test_every_drawn_metric_is_documented() -> None:
    assert {key for plan in curves._PANELS for key, _ in plan.lines} <= set(keys.MEANINGS)


def test_a_long_curve_is_smoothed_without_moving_it() -> None:
    line = np.linspace(0.0, 1.0, 200)
    np.testing.assert_allclose(curves._moving_mean(line), line, atol=1e-12)
    noisy = line + np.where(np.arange(200) % 2, 0.3, -0.3)
    assert np.abs(curves._moving_mean(noisy) - line)[5:-5].max() < 0.04
    with_gap = np.where(np.arange(200) == 100, np.nan, line)
    np.testing.assert_allclose(curves._moving_mean(with_gap), line, atol=0.02)
    assert np.isnan(curves._moving_mean(np.full(50, np.nan))).all()


def test_a_comparison_has_one_curve_a_run_with_its_best_and_last_value(tmp_path: Path, drawn: list[Figure]) -> None:
    falling = [
        {"step": step, "step_time_s": 1.0, "val/avg@8": value} for step, value in ((0, 0.5), (5, 0.65), (10, 0.4))
    ]
    runs = {
        "Co-rewarding-I": write_run(tmp_path / "a", full_rows(10)),
        "Majority voting": write_run(tmp_path / "b", [dict(row) for row in falling]),
        "Entropy": write_run(tmp_path / "c", [{"step": 1, "step_time_s": 1.0}]),
    }
    out = draw_comparison(runs, tmp_path / "pictures" / "methods.png")
    assert imread(out).shape[1] > 900
    assert [line.get_label() for line in drawn[0].axes[0].lines] == [
        "Co-rewarding-I: best 60.0%, last 60.0%",
        "Majority voting: best 65.0%, last 40.0%",
        "Entropy: not measured",
    ]
    assert titles(drawn[0]) == ["Validation accuracy (avg@8)"]


def test_a_comparison_takes_the_largest_k_that_the_runs_share(tmp_path: Path, drawn: list[Figure]) -> None:
    a = write_run(
        tmp_path / "a", [{"step": 1, "step_time_s": 1.0, "val/avg@4": 0.1, "val/avg@8": 0.2, "val/avg@16": 0.3}]
    )
    b = write_run(tmp_path / "b", [{"step": 1, "step_time_s": 1.0, "val/avg@4": 0.1, "val/avg@8": 0.2}])
    draw_comparison({"a": a, "b": b}, tmp_path / "out.png")
    assert titles(drawn[0]) == ["Validation accuracy (avg@8)"]
    draw_comparison({"a": a, "b": b}, tmp_path / "out.png", metric="val/avg@16")
    assert titles(drawn[1]) == ["Validation accuracy (avg@16)"]


def test_runs_that_cannot_be_compared_are_bad_input(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [{"step": 1, "step_time_s": 1.0, "val/avg@4": 0.1}])
    b = write_run(tmp_path / "b", [{"step": 1, "step_time_s": 1.0, "val/avg@8": 0.1}])
    with pytest.raises(InputError, match=r"no val/avg@k in common \(a: val/avg@4, b: val/avg@8\)"):
        draw_comparison({"a": a, "b": b}, tmp_path / "out.png")
    with pytest.raises(InputError, match=r"none of the runs a, b has the metric val/maj@8"):
        draw_comparison({"a": a, "b": b}, tmp_path / "out.png", metric="val/maj@8")
    with pytest.raises(InputError, match="at least one run"):
        draw_comparison({}, tmp_path / "out.png")
