"""The page of a run: whole, in one file, bounded, and safe with whatever a model has written."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.report import html_page, panels
from megatron_coreward.report.compare import write_comparison
from megatron_coreward.report.report import write_report
from megatron_coreward.report.samples import HEAD_CHARACTERS, Limits, collect_samples, shorten, spread
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.telemetry import keys
from megatron_coreward.telemetry.rollout_dump import dump_rollouts, dumped_steps
from megatron_coreward.types import Role, View
from tests.report.runs import default_texts, judged_step, write_run

_OWN = "document.title='owned'"
HOSTILE = f'</script><script>{_OWN}</script><!--<img src=x onerror="{_OWN}">\u2028 \\boxed{{1}}'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """The elements of a page, and the contents of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words = ""
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.words += f" {data}"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])


def hostile(step: int, question: int, view: View, role: Role) -> list[str]:
    return [HOSTILE, *default_texts(step, question, view, role)[1:]]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def test_the_page_shows_curves_alarms_samples_and_settings(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=5)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = read(path)
    for words in (
        "Accuracy on held-out",
        "Reward",
        "Votes",
        "Stability of labels",
        "Response length",
        "Entropy",
        "KL",
        "Teacher decay",
    ):
        assert words in page.words
    assert "Where the time of a step goes" in page.words
    assert "No alarm in 5 steps" in page.words
    assert "method: co_rewarding_i+ii" in page.words
    assert page.count("svg") == page.count("figure") == len(page.data["charts"])
    assert [entry["step"] for entry in page.data["samples"]] == [1, 2, 3, 4, 5]
    question = page.data["samples"][0]["questions"][0]
    assert [(group["view"], group["role"]) for group in question["groups"]] == [
        ("original", "policy"),
        ("rephrased", "policy"),
        ("original", "teacher"),
        ("rephrased", "teacher"),
    ]
    group = question["groups"][0]
    assert (group["vote"], group["share"], group["label"]) == ("1", 0.5, "1")
    assert [rollout["winner"] for rollout in group["rollouts"]] == [True, True, False, False]
    assert [rollout["reward"] for rollout in group["rollouts"]] == [1.0, 1.0, 0.0, 0.0]
    assert group["rollouts"][3]["answer"] is None


def test_alarms_stand_in_the_table_and_in_the_curves(tmp_path: Path) -> None:
    guard = {"warmup": 2, "window": 1, "warn_after": 1, "act_after": 2, "kl": 0.001}

    def emptying(step: int, question: int, view: View, role: Role) -> list[str]:
        return ["who knows"] * 4 if step > 3 else default_texts(step, question, view, role)

    path = write_report(write_run(tmp_path / "run", steps=6, texts=emptying, config={"guard": guard}))
    page = read(path)
    assert "rollouts without an answer 25% -> 100%" in page.words
    assert "KL to the reference" in page.words
    markup = path.read_text()
    assert markup.count('class="mark warn"') == markup.count('class="mark act"') > 5
    assert "act, last at step 6" in page.words


def test_nothing_is_loaded_and_only_our_script_may_run(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", texts=hostile))
    page = read(path)
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#"), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert page.count("img") == page.count("link") == 0
    assert page.count("script") == 2
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_a_model_wrote_comes_back_as_it_was_and_never_as_markup(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", texts=hostile))
    rollout = read(path).data["samples"][0]["questions"][0]["groups"][0]["rollouts"][0]
    assert rollout["text"] == HOSTILE
    assert "<img" not in path.read_text()


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028\u2029", "\ud800", "&lt;", "\x00"])
def test_embedded_json_reads_back_and_holds_no_markup(text: str) -> None:
    embedded = html_page.embed({text: [text]})
    assert json.loads(embedded) == {text: [text]}
    assert not re.search("[<>&\u2028\u2029]", embedded)
    embedded.encode()


def test_a_page_is_bounded_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=9)
    page = read(write_report(run_dir, limits=Limits(steps=3, questions=2)))
    assert [entry["step"] for entry in page.data["samples"]] == [1, 5, 9]
    assert [(len(entry["questions"]), entry["of"]) for entry in page.data["samples"]] == [(2, 4)] * 3
    assert "Shown: 3 of 9 dumped steps, 6 of their 12 questions." in page.words


def test_long_texts_keep_their_ends_and_a_budget_holds_however_long_they_are(tmp_path: Path) -> None:
    def long(step: int, question: int, view: View, role: Role) -> list[str]:
        return [f"{step}{question}" + "x" * 10_000 + f"\\boxed{{{n}}}" for n in range(4)]

    with AnswerEquivalence("exact") as equivalence:
        for step in range(1, 5):
            dump_rollouts(tmp_path, step, judged_step("co_rewarding_i", step, long, RewardSettings(), equivalence))
        limits = Limits(steps=4, questions=4, characters=100_000)
        samples = collect_samples(dumped_steps(tmp_path), equivalence, 0.0, limits)
    texts = [
        rollout["text"]
        for entry in samples.steps
        for question in entry["questions"]
        for group in question["groups"]
        for rollout in group["rollouts"]
    ]
    assert all(entry["questions"] for entry in samples.steps)
    assert sum(map(len, texts)) < 1.1 * limits.characters
    assert all(text.startswith(("1", "2", "3", "4")) and text.endswith("}") for text in texts)
    assert "long texts shortened in the middle" in samples.left_out


def test_shortening_leaves_what_fits() -> None:
    assert shorten("x" * HEAD_CHARACTERS) == "x" * HEAD_CHARACTERS
    assert "[... 5000 characters ...]" in shorten("x" * (HEAD_CHARACTERS + 600 + 5000))


@pytest.mark.parametrize(
    ("length", "most", "expected"), [(3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (9, 1, [8]), (9, 0, []), (0, 3, [])]
)
def test_a_spread_holds_both_ends(length: int, most: int, expected: list[int]) -> None:
    assert spread(range(length), most) == expected


def test_a_run_without_rollouts_or_configuration_still_has_a_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    shutil.rmtree(run_dir / "rollouts")
    (run_dir / "config.yaml").unlink()
    page = read(write_report(run_dir))
    assert "This run kept no rollouts." in page.words
    assert "no config.yaml" in page.words


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = write_run(tmp_path / "run")
    path = write_report(run_dir)
    before, files = path.read_bytes(), sorted(run_dir.iterdir())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"cannot write .*report.html: No space left"):
        write_report(run_dir)
    assert path.read_bytes() == before
    assert sorted(run_dir.iterdir()) == files


def test_several_runs_stand_over_each_other_and_in_a_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", method) for name, method in (("a", "co_rewarding_i"), ("b", "entropy"))]
    page = read(write_comparison(runs, tmp_path / "out" / "all.html"))
    assert "a/run" in page.words
    assert "b/run" in page.words
    assert "40.0% → 70.0%" in page.words
    assert "Settings that differ" in page.words
    reward = page.data["charts"][2]
    assert [line["name"] for line in reward["lines"]] == ["a/run", "b/run"]
    assert page.count("figure") == len(page.data["charts"])


def test_the_best_of_runs_that_validate_greedily_is_that_of_their_one_answer(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", "entropy") for name in ("a", "b")]
    for run_dir in runs:
        rows = (run_dir / "metrics.jsonl").read_text().replace("val/pass@1", "other").replace("val/avg@8", "val/pass@1")
        (run_dir / "metrics.jsonl").write_text(rows)
    assert "70.0% at 3" in read(write_comparison(runs, tmp_path / "all.html")).words


def test_a_comparison_needs_two_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two run directories"):
        write_comparison([write_run(tmp_path / "run")], tmp_path / "all.html")


def test_every_metric_of_the_panels_is_one_that_runs_write() -> None:
    shown = {key for panel in panels.PANELS for key, _ in panel.lines}
    assert shown <= set(keys.MEANINGS)


def test_every_phase_of_a_step_has_its_own_colour() -> None:
    assert {*keys.PHASES, keys.OUTSIDE} <= set(panels.PHASE_COLORS)
    assert len(set(panels.PHASE_COLORS.values())) == len(panels.PHASE_COLORS)


def test_the_validation_before_training_is_no_step_of_the_time() -> None:
    rows = [{keys.STEP: 0, keys.STEP_TIME: 9.0, "val/avg@8": 0.5}, {keys.STEP: 1, keys.STEP_TIME: 3.0}]
    assert panels.points_of(rows, keys.STEP_TIME) == [(1, 3.0)]
    assert panels.points_of(rows, "val/avg@8") == [(0, 0.5)]


def test_going_back_is_reported_with_its_reason(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    line = json.dumps({"from": 57, "to": 40, "reason": "<b>KL</b>"})
    (run_dir / "rollbacks.jsonl").write_text(f'{line}\n{{"from": 6')  # the last line was cut by a kill
    page = Reader(write_report(run_dir).read_text())
    assert "Went back from step 57 to step 40: <b>KL</b>." in page.words
    assert "went back 1x" in page.words


def test_the_assets_are_part_of_the_package() -> None:
    settings = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.search(r'^megatron_coreward = \[.*"report/assets/\*".*\]', settings, re.MULTILINE)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (chromium, chromium-browser or google-chrome)")
def test_in_a_browser_the_chosen_question_is_shown_and_hostile_text_does_nothing(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    path = write_report(write_run(tmp_path / "run", texts=hostile))
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"{path.as_uri()}#step=2&question=3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = Reader(done.stdout)
    assert "<title>Run run</title>" in done.stdout
    assert shown.count("img") == 0
    _, _, detail = done.stdout.partition('class="detail"')
    visible, _, _ = detail.partition('id="config"')
    assert "set/2" in Reader(visible).words
    assert "rephrased set/2?" in Reader(visible).words
    assert visible.count("&lt;img src=x") == 4  # one rollout of each group, as text
