"""The picture and the trace show what the timeline has."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_coreward.cli import main
from megatron_coreward.errors import InputError
from megatron_coreward.report.report import write_report
from megatron_coreward.report.timeline import MAX_LANES, busy_shares, last_steps, picture, write_trace
from megatron_coreward.telemetry.timeline import FILE_NAME, Interval, TimelineStep
from tests.report.runs import write_run

LINES = [
    {"step": 1, "begin": 100.0, "end": 110.0, "lanes": {
        "actors": [["update", 6, 10, 0]],
        "driver": [["rollout", 0, 6, 0]],
        "engine 0": [["sync policy", 0, 1, 0], ["sample policy", 1, 6, 12.5]]}},
    {"step": 2, "begin": 110.0, "end": 120.0, "lanes": {"engine 0": [["sample policy", -2, 5, 3]]}},
]  # fmt: skip


def write_timeline(run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in LINES))


def test_a_picture_has_a_bar_for_every_interval_and_a_lane_for_everyone(tmp_path: Path) -> None:
    write_timeline(tmp_path)
    drawn = picture(last_steps(tmp_path))
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
    titles = [title.text for title in svg.iterfind(".//{*}rect/{*}title")]
    assert titles == [
        "update: 4.00 s",
        "waits for rollouts: 6.00 s",
        "sync policy: 1.00 s",
        "sample policy: 5.00 s, 12 sequences",
        "sample policy: 7.00 s, 3 sequences",
    ]
    texts = [text.text for text in svg.iterfind(".//{*}text")]
    assert texts == ["actors", "driver", "engine 0", "step 1 (10.00 s)", "step 2 (10.00 s)"]
    assert picture([]) == ""


def test_busy_counts_no_moment_twice_and_no_waiting(tmp_path: Path) -> None:
    write_timeline(tmp_path)
    assert busy_shares(last_steps(tmp_path)) == pytest.approx({"actors": 0.2, "driver": 0.0, "engine 0": 13 / 20})


def test_a_picture_is_bounded_and_markup_in_a_lane_stays_text() -> None:
    lanes = {f"engine {i}<b>": [Interval("sample policy", 0.0, 1.0)] for i in range(MAX_LANES + 5)}
    drawn = picture([TimelineStep(1, 0.0, 1.0, lanes)])
    assert drawn.count("<rect") == MAX_LANES
    assert "5 further lanes" in drawn
    assert "<b>" not in drawn


def test_the_page_of_a_run_shows_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    assert "The run has no timeline." in write_report(run_dir).read_text()
    write_timeline(run_dir)
    page = write_report(run_dir).read_text()
    assert "Who was busy when" in page
    assert "engine 0 65%" in page


def test_the_trace_has_every_interval_in_microseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"timeline\.jsonl: no steps"):
        write_trace(tmp_path / "run", tmp_path / "trace.json")
    write_timeline(tmp_path / "run")
    main(["report", str(tmp_path / "run"), "--trace", str(tmp_path / "trace.json")])
    assert str(tmp_path / "trace.json") in capsys.readouterr().out
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("steps", "step 1", 0, 10_000_000),
        ("actors", "update", 6_000_000, 4_000_000),
        ("driver", "rollout", 0, 6_000_000),
        ("engine 0", "sync policy", 0, 1_000_000),
        ("engine 0", "sample policy", 1_000_000, 5_000_000),
        ("steps", "step 2", 10_000_000, 10_000_000),
        ("engine 0", "sample policy", 8_000_000, 7_000_000),
    ]
