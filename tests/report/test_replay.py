"""A replay agrees with an honest run, and names what was changed in one that is not."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_coreward.cli import main
from megatron_coreward.errors import InputError
from megatron_coreward.report.counterfactual import counterfactual, counterfactual_summary
from megatron_coreward.report.replay import replay, summary
from megatron_coreward.report.report import write_report
from megatron_coreward.report.run_record import load_record
from megatron_coreward.rewards.equivalence import Relation
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, dump_rollouts, read_rollouts, rollouts_path
from megatron_coreward.types import Role, View
from tests.report.runs import write_run

Change = Callable[[ScoredGroup], ScoredGroup]


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_run_comes_out_as_recorded(tmp_path: Path, method: str) -> None:
    record = load_record(write_run(tmp_path / "run", method))
    result = replay(record)
    assert [str(difference) for difference in result.differences] == []
    assert result.steps == 3
    assert set(result.compared) == {"answer", "label", "reward", "advantage", "metric", "guard"}
    assert all("all as recorded" in line for line in summary(record, result)[1:7])
    needs = METHODS[method].needs
    assert bool(result.notes) == (needs.token_stats or needs.ground_truth)


@pytest.mark.parametrize(
    ("forms", "as_recorded"), [(["hashes"], True), (["boxed", "hashes"], True), (["boxed"], False)]
)
def test_answers_are_read_in_the_forms_of_the_run(tmp_path: Path, forms: list[str], as_recorded: bool) -> None:
    def texts(step: int, question: int, view: View, role: Role) -> list[str]:
        return [f"so it is #### {question + step}", f"#### {question + step}", f"or #### {step}", "who knows"]

    record = load_record(write_run(tmp_path / "run", texts=texts, config={"rewards": {"answer_formats": forms}}))
    answers = [difference for difference in replay(record).differences if difference.what == "answer"]
    assert (answers == []) is as_recorded


def test_label_quality_is_recomputed_where_the_answers_of_the_data_set_were_kept(tmp_path: Path) -> None:
    record = load_record(write_run(tmp_path / "run", "majority_voting", ground_truth="2"))
    assert {"label/accuracy", "rollout/accuracy"} <= set(record.steps[0])
    assert replay(record).equal
    record.steps[0]["label/accuracy"] = 0.99
    assert [difference.where for difference in replay(record).differences] == ["label/accuracy"]


def test_a_run_without_a_configuration_is_refused_by_name(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"config\.yaml: missing or empty"):
        replay(load_record(run_dir))


def edit(run_dir: Path, step: int, change: Change) -> None:
    """Changes the first group of a step's dump."""
    first, *others = read_rollouts(rollouts_path(run_dir, step))
    dump_rollouts(run_dir, step, [change(first), *others])


def with_answer(item: ScoredGroup) -> ScoredGroup:
    first, *others = item.group.completions
    changed = replace(first, answer="999")
    return replace(item, group=replace(item.group, completions=(changed, *others)))


def shifted(values: Any) -> Any:
    return values + np.asarray([0.5, 0, 0, 0], dtype=np.float32)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("answer", with_answer),
        ("label", lambda item: replace(item, label="999")),
        ("reward", lambda item: replace(item, rewards=shifted(item.rewards))),
        ("advantage", lambda item: replace(item, advantages=shifted(item.advantages))),
    ],
)
def test_what_was_changed_in_a_dump_is_named_with_its_step_and_group(tmp_path: Path, what: str, change: Change) -> None:
    run_dir = write_run(tmp_path / "run")
    edit(run_dir, 2, change)
    record = load_record(run_dir)
    result = replay(record)
    assert not result.equal
    found = [difference for difference in result.differences if difference.what == what]
    assert found[0].step == 2
    assert found[0].where.startswith("set/0 (original, policy)")
    assert {difference.step for difference in result.differences} == {2}
    assert any("step 2, set/0 (original, policy)" in line for line in summary(record, result))


@pytest.mark.parametrize(("key", "what"), [("vote/share", "metric"), ("guard/level", "guard")])
def test_a_row_that_does_not_follow_from_the_rollouts_is_named(tmp_path: Path, key: str, what: str) -> None:
    run_dir = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[2][key] += 1
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    differences = replay(load_record(run_dir)).differences
    assert (differences[0].step, differences[0].where, differences[0].what) == (2, key, what)


def test_only_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    edit(run_dir, 2, with_answer)
    record = load_record(run_dir)
    assert replay(record, range(3, 4)).steps == 1
    assert replay(record, range(3, 4)).equal
    assert not replay(record, range(2, 3)).equal


def test_a_step_that_died_before_its_row_is_noted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))
    result = replay(load_record(run_dir))
    assert result.equal
    assert result.notes == ["step 3 has rollouts and no row of metrics: the run ended within it"]


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda run: [path.unlink() for path in (run / "rollouts").iterdir()], "no rollouts to recompute"),
        (lambda run: (run / "config.yaml").write_text("method: prayer\n"), "method: found 'prayer'; expected one of"),
        (lambda run: (run / "config.yaml").write_text("{"), "not valid YAML"),
        (lambda run: (run / "config.yaml").write_text("method: entropy\nrewards: {pace: 1}\n"), "rewards.pace"),
        (lambda run: (run / "metrics.jsonl").unlink(), "no such file"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no step has been written"),
        (lambda run: [path.write_bytes(b"PAR1") for path in (run / "rollouts").iterdir()], "not a file of rollouts"),
    ],
)
def test_a_run_that_cannot_be_replayed_is_refused_in_words(
    tmp_path: Path, breaking: Callable[[Path], object], message: str
) -> None:
    run_dir = write_run(tmp_path / "run")
    breaking(run_dir)
    with pytest.raises(InputError, match=message):
        replay(load_record(run_dir))


@pytest.mark.parametrize("left", [0.5, 0.9, 0.99])
def test_a_dump_that_was_cut_off_is_noted_and_the_others_are_replayed_and_shown(tmp_path: Path, left: float) -> None:
    run_dir = write_run(tmp_path / "run")
    content = rollouts_path(run_dir, 2).read_bytes()
    rollouts_path(run_dir, 2).write_bytes(content[: int(left * len(content))])
    record = load_record(run_dir)
    result = replay(record)
    assert result.equal
    assert result.steps == len(record.dumps) - 1
    assert any(note.startswith("step 2 is left out: ") for note in result.notes)
    assert any("step 2 is left out" in note for note in counterfactual(record, "math").notes)
    assert "the rollouts of steps 2 cannot be read" in write_report(run_dir).read_text()
    with pytest.raises(InputError, match=r"step_000002.parquet: not a file of rollouts"):
        replay(record, range(2, 3))


@pytest.mark.long
def test_what_models_and_data_wrote_is_escaped_and_bounded_where_a_replay_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hostile(step: int, question: int, view: View, role: Role) -> list[str]:
        return [f"\\boxed{{\x1b[2J{place}{'9' * 1_000_000}}}" for place in range(4)]

    run_dir = write_run(tmp_path / "run", "majority_voting", steps=1, texts=hostile)
    assert main(["replay", str(run_dir), "--equivalence", "math"]) == 0
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config + "\nrewards: {answer_formats: [plain]}\n")  # nothing is as recorded
    with pytest.raises(SystemExit, match="1"):
        main(["replay", str(run_dir)])
    shown = capsys.readouterr().out
    assert "differ" in shown
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
    assert len(shown) < 20_000


def test_replay_and_report_never_say_that_a_run_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "step_time_s": 1.0}\n{broken}\n')
    for command in ("replay", "report"):
        assert main([command, str(run_dir)]) == 2
    assert main(["compare", str(run_dir), str(run_dir)]) == 2
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    assert main(["report", str(run_dir)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("metrics.jsonl, line 2: not JSON") == 3
    assert "Traceback" not in printed
    assert "the run failed" not in printed


def halves(step: int, question: int, view: View, role: Role) -> list[str]:
    """Under `math`, the two halves win; under `exact` the lone string that comes twice does."""
    return ["\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "\\boxed{7}", "\\boxed{7}"]


def test_another_relation_shows_what_it_would_have_changed(tmp_path: Path) -> None:
    record = load_record(write_run(tmp_path / "run", "majority_voting", steps=2, texts=halves, ground_truth="0.5"))
    result = counterfactual(record, "math")
    assert (result.groups, result.rollouts) == (8, 40)
    assert result.labels_changed == 8
    assert result.rewards_changed == 40
    assert (result.labels_right_recorded, result.labels_right_now) == (0, 8)
    lines = counterfactual_summary(record, "math", result)
    assert lines[3] == "  mean reward 0.4000, then 0.6000"
    assert lines[4] == "  label accuracy 0.0%, then 100.0%, both by math"
    assert "label '7', now '1/2'; 5 rewards change" in lines[6]
    same = counterfactual(record, "exact")
    assert (same.labels_changed, same.rewards_changed) == (0, 0)


@pytest.mark.parametrize(
    ("method", "early_stop", "relation", "noted"),
    [
        ("co_rewarding_ii", True, "math", True),
        ("co_rewarding_ii", True, "exact", False),  # under which they were decided
        ("co_rewarding_ii", False, "math", False),
        ("majority_voting", True, "math", False),  # which has no teacher
    ],
)
def test_votes_that_were_cut_under_one_relation_are_noted_under_another(
    tmp_path: Path, method: str, early_stop: bool, relation: Relation, noted: bool
) -> None:
    record = load_record(write_run(tmp_path / "run", method, config={"teacher": {"early_stop": early_stop}}))
    result = counterfactual(record, relation)
    page = "\n".join(counterfactual_summary(record, relation, result))
    assert ("note: with teacher.early_stop a vote of the teacher ended when exact had decided it" in page) is noted
    assert not any("early_stop" in note for note in replay(record).notes)


def test_another_relation_means_nothing_to_rewards_without_answers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rest on token statistics, which are not dumped"):
        counterfactual(load_record(write_run(tmp_path / "run", "entropy")), "math")


@pytest.mark.long
def test_the_commands_answer_with_their_statuses_without_engine_megatron_or_torch(tmp_path: Path) -> None:
    honest, other = write_run(tmp_path / "honest"), write_run(tmp_path / "other")
    edit(other, 1, with_answer)
    program = (
        "import sys\n"
        "for name in ('megatron', 'vllm', 'ray', 'torch', 'transformers'): sys.modules[name] = None\n"
        "from megatron_coreward import cli\n"
        "options = cli.make_parser().parse_args(sys.argv[1:])\n"
        "options.run(options)\n"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
        )

    good, bad = run("replay", str(honest)), run("replay", str(other), "--steps", "1-2")
    assert (good.returncode, bad.returncode) == (0, 1), good.stderr + bad.stderr
    assert "first differences" in bad.stdout
    page = tmp_path / "all.html"
    assert run("compare", str(honest), str(other), "--out", str(page)).returncode == 0
    assert page.is_file()


def test_a_run_directory_never_has_code_imported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    for setting in ("tests.report.never_imported:Method", {"empo": 1.0, "tests.report.never_imported:Method": 1.0}):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "method": setting}))
        with pytest.raises(InputError, match="is code, which is not imported because a run directory names it"):
            replay(load_record(run))


def test_a_run_with_a_mixture_comes_out_as_recorded_and_is_shown_by_its_parts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "empo")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "method": {"empo": 1.0}}))
    record = load_record(run)
    result = replay(record)
    assert result.equal
    assert summary(record, result)[0].endswith(": 1.0 x empo, 3 steps recomputed")
