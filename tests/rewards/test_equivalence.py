"""The relation under votes and rewards: symmetric, deaf to spelling, exact on numbers, and never stuck."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards import equivalence as module
from megatron_coreward.rewards.equivalence import AnswerEquivalence, equivalent
from megatron_coreward.rewards.symbolic import Outcome, Request

pytestmark = pytest.mark.timeout(120)

TOWER = r"\sum_{k=1}^{3} 9^{9^{9^{9}}}"
START_S = 60.0  # for the start of a process on a crowded machine


@pytest.fixture(scope="module")
def math() -> Iterator[AnswerEquivalence]:
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        yield equivalence


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\dfrac{1}{2}", "0.5", True),
        ("1,000", "1000", True),
        (r"50\%", "50", True),
        ("x=5", "5", True),
        (r"2\sqrt{2}", r"\sqrt 8", True),
        (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt{3}}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"\begin{pmatrix} 6/5 \\ -17/5 \end{pmatrix}", r"\begin{pmatrix} 1.2 \\ -3.4 \end{pmatrix}", True),
        (r"(4, \pi)", r"\left(4,\pi\right)", True),
        (r"1, \pi, 2", r"2, 1, \pi", True),
        (r"\text{even}", "Even", True),
        ("0.333333", "1/3", False),
        ("1", "2", False),
        (r"2\sqrt{2}", r"3\sqrt{2}", False),
        ("x+1", "x-1", False),
        (r"\text{even}", r"\text{odd}", False),
        ("A", "B", False),
    ],
)
def test_math_relates_values_and_not_spellings(math: AnswerEquivalence, a: str, b: str, same: bool) -> None:
    assert math.equivalent(a, b) is same
    assert math.equivalent(b, a) is same


def test_exact_relates_equal_strings_only() -> None:
    equivalence = AnswerEquivalence("exact")
    assert equivalence.equivalent("0.5", "0.5")
    assert not equivalence.equivalent("0.5", ".5")
    assert not equivalence.equivalent("0.5", "0.50")


@pytest.mark.parametrize("relation", ["exact", "math"])
@pytest.mark.parametrize("nothing", [None, "", "  ", "\n"])
def test_no_answer_is_equivalent_to_nothing(relation: module.Relation, nothing: str | None) -> None:
    equivalence = AnswerEquivalence(relation)
    assert not equivalence.equivalent(nothing, nothing)
    assert not equivalence.equivalent(nothing, "1")
    assert not equivalence.equivalent("1", nothing)


def test_classes_are_numbered_by_first_sight_and_skip_missing_answers(math: AnswerEquivalence) -> None:
    answers = ["2", None, r"\sqrt{2}", "2.0", "", r"\frac{2}{\sqrt{2}}", r"\frac{4}{2}", "3"]
    assert math.classes(answers) == [0, None, 1, 0, None, 1, 0, 2]
    assert AnswerEquivalence("exact").classes(answers) == [0, None, 1, 2, None, 3, 4, 5]


@given(st.lists(st.none() | st.sampled_from(["1", "1.0", "2", "4/2", "(1,2)", "(1, 2)", r"\text{yes}", "Yes", " "])))
def test_classes_agree_with_the_relation_on_every_pair(answers: list[str | None]) -> None:
    equivalence = AnswerEquivalence("math")
    classes = equivalence.classes(answers)
    for a, class_a in zip(answers, classes, strict=True):
        for b, class_b in zip(answers, classes, strict=True):
            assert equivalence.equivalent(a, b) == (class_a is not None and class_a == class_b)
    assert equivalence.comparisons == 0


def test_forms_that_settle_the_question_start_no_process() -> None:
    equivalence = AnswerEquivalence("math")
    answers = ["1", "1.0", "2", "(1,2)", "(1,3)", "even", r"\text{odd}", "A", r"\sqrt{2}", r"\sqrt2", "x=1", "1" * 2000]
    equivalence.classes([answer for answer in answers if "sqrt" not in answer])
    assert equivalence.equivalent(r"\sqrt{2}", r"\sqrt2")
    assert equivalence.comparisons == 0


def test_a_pair_is_compared_once_in_whatever_order_and_spelling() -> None:
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        for a, b in [(r"\sqrt{8}", r"2\sqrt{2}"), (r"2\sqrt2", r"\sqrt8"), (r"$2\sqrt{2}$", r"x = \sqrt{8}")]:
            assert equivalence.equivalent(a, b)
            asked = equivalence.comparisons
            assert equivalence.equivalent(b, f" {a} ")
            assert equivalence.comparisons == asked


def test_the_cache_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_SIZE", 2)
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        for other in ("1", "2", "3", "3", "1"):
            equivalence.equivalent(r"\sqrt{2}", other)
        assert equivalence.comparisons == 4  # the second 3 was remembered, the 1 was not


HOSTILE = {
    "power tower": TOWER,
    "factorial": "(10^{10})!",
    "product": r"\prod_{k=1}^{1000000} k",
    "deep parentheses": "(" * 400 + "x" + ")" * 400,
    "deep braces": "{" * 400 + "x" + "}" * 400,
    "deep roots": r"\sqrt{" * 120 + "x" + "}" * 120,
    "open fractions": r"\frac{" * 150,
    "nul": "\x00x\x00",
    "lone surrogate": "x\ud800",
    "line breaks": "x\n\r\x0b\u2028y",
    "protocol": '"]\n[1, 2',
    "megabyte of digits": "1" * 1_000_000,
    "megabyte of braces": "{" * 1_000_000,
    "megabyte of commands": r"\frac{x}" * 125_000,
}


@pytest.fixture(scope="module")
def strict() -> Iterator[AnswerEquivalence]:
    with AnswerEquivalence("math", timeout_s=0.5) as equivalence:
        yield equivalence


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_cost_at_most_the_limit(strict: AnswerEquivalence, answer: str) -> None:
    start = time.monotonic()
    assert not strict.equivalent(answer, r"y+\sqrt{2}")
    assert time.monotonic() - start < 0.5 + START_S
    assert strict.equivalent(answer, answer)


def test_a_timeout_is_counted_remembered_and_survived() -> None:
    with AnswerEquivalence("math", timeout_s=1.0) as equivalence:
        assert not equivalence.equivalent(TOWER, "1")
        assert (equivalence.timeouts, equivalence.comparisons) == (1, 1)
        start = time.monotonic()
        assert not equivalence.equivalent("1", TOWER)
        assert time.monotonic() - start < 1.0
        assert (equivalence.timeouts, equivalence.comparisons) == (1, 1)
        equivalence._pool._timeout_s = 60.0  # for an honest pair on a crowded machine
        assert equivalence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
        assert (equivalence.timeouts, equivalence.comparisons) == (1, 2)


def test_a_closed_judge_can_be_used_again() -> None:
    equivalence = AnswerEquivalence("math", timeout_s=60.0)
    assert equivalence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    equivalence.close()
    assert equivalence.equivalent(r"\sqrt{18}", r"3\sqrt{2}")
    equivalence.close()


def test_the_convenience_function_is_the_math_relation() -> None:
    assert equivalent(r"\frac{2}{4}", "0.5")
    assert equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    assert not equivalent("1", "2")
    assert not equivalent("", "")
    module._shared_equivalence().close()


class Scripted:
    """Gives the outcomes that it was told, and keeps the requests."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes, self.calls = list(outcomes), []  # type: ignore[var-annotated]

    def compare(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        self.calls.append(list(requests))
        return [[self.outcomes.pop(0) if self.outcomes else False for _ in r.pairs] for r in requests]

    def close(self) -> None: ...


def test_a_comparison_that_a_stalled_machine_lost_is_asked_again_and_one_over_its_limit_is_not() -> None:
    comparer = Scripted("lost", True, "over_limit", True)
    equivalence = AnswerEquivalence("math", comparer=comparer)
    assert not equivalence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    assert equivalence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    assert equivalence.equivalent(r"2\sqrt{2}", r"\sqrt{8}")
    assert not equivalence.equivalent(r"\sqrt{18}", r"3\sqrt{2}")
    assert not equivalence.equivalent(r"\sqrt{18}", r"3\sqrt{2}")
    assert (len(comparer.calls), equivalence.comparisons, equivalence.timeouts) == (3, 3, 2)


def test_the_groups_of_a_step_are_handed_out_together_and_each_pair_once() -> None:
    comparer = Scripted()
    equivalence = AnswerEquivalence("math", comparer=comparer)
    groups = [[rf"\sqrt{{{n}}}", rf"\sqrt{{{n}}}+0", None, f"{n}x", "1", "2"] for n in range(2, 42)]
    equivalence.compare([*groups, groups[0]])
    for group in groups:
        equivalence.classes(group)
    (requests,) = comparer.calls
    assert len(requests) == len(groups)
    assert len({frozenset((r.texts[i], r.texts[j])) for r in requests for i, j in r.pairs}) == equivalence.comparisons


@pytest.mark.long
def test_a_busy_machine_changes_no_verdict() -> None:
    """The process is stopped in the middle of a comparison, and goes on: only computing counts against the limit."""
    with AnswerEquivalence("math", timeout_s=1.0, num_workers=1) as equivalence:
        assert equivalence.equivalent(r"\sum_{k=1}^{3}k", "6")  # everything is loaded
        group = os.getpgid(equivalence._pool._idle.queue[0]._process.pid)  # type: ignore[attr-defined]
        os.killpg(group, signal.SIGSTOP)
        threading.Timer(2.5, os.killpg, (group, signal.SIGCONT)).start()
        assert equivalence.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
        assert equivalence.timeouts == 0
