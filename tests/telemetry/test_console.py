import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from megatron_coreward.telemetry import console, keys
from megatron_coreward.telemetry.console import LiveView, Mode, PlainView, SilentView, open_view
from megatron_coreward.telemetry.timing import PhaseTimer

STEP = {
    "step_time_s": 4.0,
    "time/rollout_s": 2.5,
    "time/update_s": 1.2,
    "time/rewards_s": 0.01,
    "time/outside_s": 0.29,
    "reward/mean": 0.412,
    "label/accuracy": 0.58,
    "rollout/response_tokens_mean": 213.4,
    "loss/kl": 0.00123,
    "sync/logprob_gap": 3.1e-6,
}
VALIDATION = {"step_time_s": 3.0, "val/maj@8": 0.6, "val/pass@1": 0.48, "val/avg@8": 0.49, "val/problems": 96.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def text_of(view: LiveView, width: int) -> str:
    paper = Console(file=io.StringIO(), width=width, record=True)
    paper.print(view.frame())
    return paper.export_text()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[80, 140])
def live(request: pytest.FixtureRequest, clock: Clock) -> Iterator[LiveView]:
    console = Console(file=Terminal(), width=request.param, force_terminal=True)
    with LiveView("co_rewarding_i · runs/a", 20, 0, console, clock) as view:
        yield view


@pytest.mark.parametrize(
    ("mode", "stream", "kind"),
    [
        ("off", Terminal(), SilentView),
        ("plain", Terminal(), PlainView),
        ("auto", io.StringIO(), PlainView),
        ("live", io.StringIO(), PlainView),
        ("auto", Terminal(), LiveView),
        ("live", Terminal(), LiveView),
    ],
)
def test_the_view_suits_the_mode_and_the_terminal(mode: Mode, stream: io.StringIO, kind: type) -> None:
    with open_view(mode, title="run", total_steps=3, stream=stream) as view:
        assert type(view) is kind


def test_a_plain_run_reads_line_by_line() -> None:
    stream = io.StringIO()
    with open_view("plain", title="majority_voting · runs/a", total_steps=12, stream=stream) as view:
        view.write(0, VALIDATION)
        view.phase("rollout")
        view.write(11, STEP)
        view.note("checkpoint step_000011")
        view.write(12, STEP | VALIDATION)
    assert stream.getvalue().splitlines() == [
        "majority_voting · runs/a: 12 steps",
        "validation after step 0  pass@1 48.0%  avg@8 49.0%  maj@8 60.0%",
        "step 11/12  reward 0.412  label accuracy 58.0%  tokens 213  KL 1.2e-03  logprob gap 3.1e-06"
        "  4.0 s (rollout 2.5, update 1.2, outside 0.3)  eta 4.0 s",
        "checkpoint step_000011",
        "step 12/12  reward 0.412  label accuracy 58.0%  tokens 213  KL 1.2e-03  logprob gap 3.1e-06"
        "  3.0 s (rollout 2.5, update 1.2, outside 0.3)",
        "validation after step 12  pass@1 48.0%  avg@8 49.0%  maj@8 60.0%",
    ]


def test_a_resumed_run_says_where_it_goes_on() -> None:
    stream = io.StringIO()
    open_view("plain", title="run", total_steps=20, steps_done=10, stream=stream)
    assert stream.getvalue() == "run: 20 steps, resumed after step 10\n"


def test_a_step_with_nothing_but_its_time_is_shown() -> None:
    stream = io.StringIO()
    open_view("plain", title="run", total_steps=2, stream=stream).write(1, {"step_time_s": 61.0})
    assert stream.getvalue().splitlines()[-1] == "step 1/2  1m 01s  eta 1m 01s"


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with open_view("off", title="run", total_steps=2) as view:
        view.phase("rollout")
        view.write(1, {"step_time_s": 1.0})
        view.note("hello")
    assert capsys.readouterr() == ("", "")


def test_the_live_panel_shows_progress_metrics_times_and_validation(live: LiveView, clock: Clock) -> None:
    live.write(0, VALIDATION)
    live.write(10, STEP)
    live.phase("rollout")
    clock.now = 75.0
    frame = text_of(live, live._console.width)
    for expected in ("co_rewarding_i · runs/a", "step 10/20", "1m 15s elapsed", "eta 40.0 s", "last step 4.0 s"):
        assert expected in frame
    assert re.search(r"rollout +1m 15s", frame)
    assert re.search(r"label accuracy +58\.0%", frame)
    assert re.search(r"logprob gap +3\.1e-06", frame)
    assert re.search(r"■ rollout 2\.5 s", frame)
    assert re.search(r"validation +pass@1 +avg@8 +maj@8", frame)
    assert re.search(r"after step 0 +48\.0% +49\.0% +60\.0%", frame)
    assert "problems" not in frame


def test_the_live_panel_fits_its_terminal(live: LiveView) -> None:
    live.write(1, STEP | VALIDATION)
    width = live._console.width
    assert {len(line) for line in text_of(live, width).splitlines()} == {width}


def test_the_time_bar_is_as_long_as_it_should_be_for_any_split(live: LiveView) -> None:
    for share in (0.001, 0.33, 0.5, 0.999):
        live.write(1, {"step_time_s": 1.0, "time/rollout_s": share, "time/update_s": 1 - share})
        assert text_of(live, 140).count("█") == 48


def test_sparklines_remember_the_last_steps(live: LiveView) -> None:
    for step in range(1, 40):
        live.write(step, {"step_time_s": 1.0, "reward/mean": float(step)})
    live.write(40, {"step_time_s": 1.0, "vote/share": 0.5})
    live.write(41, {"step_time_s": 1.0, "reward/mean": 0.0})
    bars = re.search(r"reward +0\.000 +([▁-█]+)", text_of(live, 140))
    assert bars is not None
    assert len(bars[1]) == (24 if live._console.width >= 110 else 12)
    assert bars[1].endswith("█▁")


def test_the_live_view_follows_the_phase_timer(live: LiveView) -> None:
    timer = PhaseTimer(on_change=live.phase)
    with timer.phase("update"):
        assert "update" in text_of(live, 140)
    assert "update" not in text_of(live, 140)


def test_after_the_last_step_no_time_is_left(live: LiveView) -> None:
    live.write(20, STEP)
    assert "eta" not in text_of(live, 140)


def test_notes_stay_on_the_screen_above_the_panel(clock: Clock) -> None:
    stream = Terminal()
    with LiveView("run", 2, 0, Console(file=stream, width=80, force_terminal=True), clock) as view:
        view.note("engine 0 restarted [1/3]")
        view.write(1, STEP)
    assert "engine 0 restarted [1/3]" in stream.getvalue()
    assert "step 1/2" in stream.getvalue()


def test_every_phase_has_a_colour() -> None:
    assert {*keys.PHASES, keys.OUTSIDE} == console._PHASE_COLORS.keys()
