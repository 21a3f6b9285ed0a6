"""`report`: one run on one page. Curves, alarms of the guard, where the time goes, samples, the configuration."""

from pathlib import Path
from typing import Any

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.methods import method_title
from megatron_coreward.config.schema import RewardSettings
from megatron_coreward.guard import Decision, replay_rows
from megatron_coreward.report import panels, timeline
from megatron_coreward.report.chart import Mark
from megatron_coreward.report.html_page import figures, readouts, section, table, text, write_page
from megatron_coreward.report.question_states import State, read_visits, states_over_steps
from megatron_coreward.report.run_record import RunRecord, load_record
from megatron_coreward.report.samples import Limits, Samples, collect_samples
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.telemetry import keys, label_history
from megatron_coreward.telemetry.display import format_seconds

_FILTERS = {
    "all": "every question",
    "flat": "no variance: teaches nothing",
    "split": "vote share below one half",
    "tie": "tied vote",
    "nolabel": "no label",
    "noanswer": "a rollout without an answer",
    "cut": "a rollout cut off",
    "other": "own vote is another string than the label",
    "wrong": "label is another string than the data set's answer",
}


def write_report(run_dir: Path, out: Path | None = None, limits: Limits | None = None) -> Path:
    """Writes the page of a run, `report.html` in its directory unless another path is given. Returns its path.

    Raises InputError if `run_dir` is no run directory.
    """
    record = load_record(run_dir)
    rewards = record.settings("rewards", RewardSettings)
    with AnswerEquivalence(
        rewards.equivalence, rewards.comparison_timeout_s, rewards.comparison_workers
    ) as equivalence:
        samples = collect_samples(record.dumps, equivalence, rewards.min_margin, limits or Limits())
    decisions = [decision for _, decision in replay_rows(record.settings("guard", GuardSettings), record.steps)]
    marks = [
        Mark(decision.step, decision.level) for decision in decisions if decision.news and decision.level != "none"
    ]
    drawn = [
        item
        for panel in (panels.validation_panel(record.known_keys()), *panels.PANELS)
        if (item := panels.draw(panel, record.rows, marks)) is not None
    ]
    more = (panels.draw_states(_question_states(run_dir)), panels.draw_time(record.rows))
    drawn += [item for item in more if item is not None]
    path = out or run_dir / "report.html"
    sections = [
        _head(record, decisions),
        section("curves", "Curves", figures(drawn)),
        section("timeline", "Who was busy when", _timeline(record)),
        section("guard", "Collapse guard", _guard(record, decisions)),
        section("samples", "Samples", _browser(samples)),
        section("config", "Configuration and events", _config(record)),
    ]
    write_page(path, f"Run {record.name}", sections, {"charts": readouts(drawn), "samples": samples.steps})
    return path


def _question_states(run_dir: Path) -> list[tuple[int, dict[State, int]]]:
    labels = run_dir / label_history.FILE_NAME
    return list(states_over_steps(read_visits(labels))) if labels.is_file() else []


def _head(record: RunRecord, decisions: list[Decision]) -> str:
    steps, planned = record.steps, record.config.get("steps")
    done = int(steps[-1][keys.STEP] or 0) if steps else 0
    facts: list[tuple[str, str, bool]] = [("steps done", f"{done} of {planned}" if planned else str(done), False)]
    for key in keys.validation_keys(record.known_keys()):
        values = [value for row in record.rows if (value := row.get(key)) is not None]
        facts.append((f"{key.removeprefix('val/')}, first and last", f"{values[0]:.1%} → {values[-1]:.1%}", False))
    for key, name in (("label/accuracy", "label accuracy"), ("vote/share", "vote share"), ("reward/mean", "reward")):
        known = [value for row in steps if (value := row.get(key)) is not None]
        if known:
            facts.append(
                (f"{name}, last step", f"{known[-1]:.1%}" if key != "reward/mean" else f"{known[-1]:.3g}", False)
            )
    seconds = sum(row.get(keys.STEP_TIME) or 0.0 for row in record.rows)
    facts.append(("in all steps", format_seconds(seconds), False))
    alarm = next((decision for decision in reversed(decisions) if decision.level != "none"), None)
    worst = "none" if alarm is None else f"{alarm.level}, last at step {alarm.step}"
    if record.rollbacks:
        worst = f"{worst}; went back {len(record.rollbacks)}x"
    facts.append(("collapse guard", worst, alarm is not None or bool(record.rollbacks)))
    cards = "".join(
        f'<div class="card{" alarm" if alarming else ""}"><b>{text(value)}</b><span>{text(name)}</span></div>'
        for name, value, alarming in facts
    )
    method = method_title(record.config.get("method", "unknown method"))
    model = (record.config.get("model") or {}).get("hf_path", "")
    menu = "".join(
        f'<a href="#{name}">{title}</a>'
        for name, title in (
            ("curves", "Curves"),
            ("timeline", "Timeline"),
            ("guard", "Guard"),
            ("samples", "Samples"),
            ("config", "Configuration"),
        )
    )
    return (
        f"<nav>{menu}</nav><h1>{text(record.name)}</h1>"
        f'<p class="dim">{text(method)} on {text(model)}</p><div class="cards">{cards}</div>\n'
    )


def _timeline(record: RunRecord) -> str:
    steps = timeline.last_steps(record.run_dir)
    if not steps:
        return "<p>The run has no timeline.</p>"
    shares = ", ".join(f"{text(lane)} {share:.0%}" for lane, share in timeline.busy_shares(steps).items())
    return (
        f"{timeline.picture(steps)}<p class=dim>The last {len(steps)} steps; what has no colour was idle. "
        f"Busy: {shares}. All steps, for chrome://tracing or Perfetto: megatron-coreward report RUN --trace FILE.</p>"
    )


def _guard(record: RunRecord, decisions: list[Decision]) -> str:
    recorded = any("guard/level" in row for row in record.rows)
    source = (
        "As the run's settings decide on its metrics."
        if recorded
        else "The run recorded no decisions; this is what the guard's settings say of its metrics."
    )
    reported = [decision for decision in decisions if decision.news]
    back = "".join(
        f"<p>Went back from step {text(entry.get('from'))} to step {text(entry.get('to'))}: "
        f"{text(entry.get('reason'))}. The steps in between were done again.</p>"
        for entry in record.rollbacks
    )
    if not reported:
        return f"{back}<p>No alarm in {len(decisions)} steps.</p><p class=dim>{source}</p>"
    rows = [
        [
            str(decision.step),
            f'<span class="tag bad">{decision.level}</span>',
            text(decision.action or ""),
            text(decision.reason),
            str(decision.good_step),
        ]
        for decision in reported
    ]
    head = ("step", "level", "action", "indicators, against the mean of the first steps", "last step before them")
    marked = "Dashed lines in the curves are at these steps."
    return f"{back}{table(head, rows, numeric=(0, 4))}<p class=dim>{source} {marked}</p>"


def _browser(samples: Samples) -> str:
    said = f'<p class="dim">{text(samples.left_out)}</p>'
    if not samples.steps:
        return said
    options = "".join(f'<option value="{name}">{text(words)}</option>' for name, words in _FILTERS.items())
    return (
        f'{said}<div id="browser"><div class="controls"><select id="step" aria-label="step"></select>'
        f'<select id="filter" aria-label="filter">{options}</select>'
        '<input id="search" type="search" placeholder="search in questions and rollouts" aria-label="search">'
        '<span class="dim count"></span><span class="dim">keys: j next, k previous</span></div>'
        '<div class="browser"><div class="list"></div><div class="detail"></div></div></div>'
    )


def _config(record: RunRecord) -> str:
    parts: list[Any] = []
    if record.config_text:
        parts.append(f"<details><summary>config.yaml</summary><pre>{text(record.config_text)}</pre></details>")
    if record.events:
        events = "\n".join(record.events[-200:])
        parts.append(
            f"<details><summary>events.log, {len(record.events)} lines</summary><pre>{text(events)}</pre></details>"
        )
    return "".join(parts) or '<p class="dim">This run directory has no config.yaml.</p>'
