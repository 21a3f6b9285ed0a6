"""What became of a question is read from its first label, its last one, and the one before."""

import json
from pathlib import Path

import pytest

from megatron_coreward.errors import InputError
from megatron_coreward.report.panels import STATE_COLORS, draw_states
from megatron_coreward.report.question_states import STATES, State, Visit, read_visits, state_of, states_over_steps


def visits(*seen: tuple[str, float, bool]) -> list[Visit]:
    return [Visit(step, *visit) for step, visit in enumerate(seen, start=1)]


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        ([("3", 0.5, False), ("4", 0.5, True)], "learned"),
        ([("4", 0.5, True), ("4", 0.5, True)], "sharpened"),
        ([("4", 0.5, True), ("3", 0.9, False), ("4", 0.6, True)], "sharpened"),
        ([("4", 0.9, True), ("4", 0.5, True)], "weakened"),
        ([("4", 0.5, True), ("3", 0.5, False)], "corrupted"),
        ([("4", 0.5, True), ("3", 0.9, False), ("3", 0.9, False)], "corrupted"),
        ([("3", 0.3, False), ("3", 0.5, False)], "locked"),
        ([("3", 0.3, False), ("3", 0.4, False)], "unsettled"),
        ([("2", 0.9, False), ("3", 0.9, False)], "unsettled"),
        ([("2", 0.9, False), ("3", 0.9, False), ("3", 1.0, False)], "locked"),
    ],
)
def test_each_state_by_its_labels(seen: list[tuple[str, float, bool]], state: State) -> None:
    assert state_of(visits(*seen)) == state


def write(path: Path, *steps: list[list[object]]) -> Path:
    lines = [json.dumps({"step": step, "labels": labels}) for step, labels in enumerate(steps, start=1)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_questions_are_counted_from_their_second_visit_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "labels.jsonl",
        [["a", "original", "3", 0.5, False], ["b", "original", "7", 0.5, True]],
        [["c", "original", "1", 0.5, True]],
        [["a", "original", "4", 0.5, True], ["b", "original", "7", 0.4, True]],
        [["b", "original", "9", 0.4, False]],
    )
    states = dict(states_over_steps(read_visits(path)))
    assert {step: {name: n for name, n in count.items() if n} for step, count in states.items()} == {
        3: {"learned": 1, "weakened": 1},
        4: {"learned": 1, "corrupted": 1},
    }
    assert set(states[3]) == set(STATES)


def test_the_views_of_a_question_are_judged_apart_and_unknown_truths_not_at_all(tmp_path: Path) -> None:
    path = write(
        tmp_path / "labels.jsonl",
        [["a", "original", "3", 0.5, False], ["a", "rephrased", "4", 0.5, True], ["b", "original", "1", 0.5, None]],
        [["a", "original", "3", 0.9, False], ["a", "rephrased", "4", 0.9, True], ["b", "original", "1"]],
    )
    found = read_visits(path)
    assert set(found) == {("a", "original"), ("a", "rephrased")}
    (_, count) = list(states_over_steps(found))[-1]
    assert (count["locked"], count["sharpened"]) == (1, 1)


def test_a_damaged_line_is_named_and_a_part_of_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"step": 1, "labels": []}\n{"step": 2, "lab')
    assert read_visits(path) == {}
    path.write_text('{"step": 1, "labels": []}\nnonsense\n')
    with pytest.raises(InputError, match="labels.jsonl, line 2"):
        read_visits(path)


def test_the_panel_stacks_every_state_and_is_left_out_without_any(tmp_path: Path) -> None:
    path = write(
        tmp_path / "labels.jsonl",
        [["a", "original", "3", 0.5, False], ["b", "original", "7", 0.5, True]],
        [["a", "original", "4", 0.5, True], ["b", "original", "9", 0.4, False]],
    )
    drawn = draw_states(list(states_over_steps(read_visits(path))))
    assert drawn is not None
    assert drawn.legend == list(STATE_COLORS.items())
    assert tuple(STATE_COLORS) == STATES
    shown = {line["name"]: line["shown"] for line in drawn.chart.readout["lines"]}
    assert (shown["learned"], shown["corrupted"], shown["locked"]) == (["50.0%"], ["50.0%"], ["0.0%"])
    assert draw_states([]) is None
