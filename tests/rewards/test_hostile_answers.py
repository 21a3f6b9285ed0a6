"""Strings that want to break the judge: nothing hangs, nothing is executed, honest pairs are answered afterwards."""

import sys

import pytest

from benchmarks.answer_cases import MARKER, hostile
from benchmarks.bench_answers import hostile_run
from megatron_coreward.rewards.brackets import MAX_DEPTH
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.kinds import Phrase
from megatron_coreward.rewards.latex import MAX_LENGTH, _clean
from megatron_coreward.rewards.reading import read

CASES = 300
# What the interpreter, the thread pool and the judge's bounded memory may take; a kept answer of each megabyte would
# be several times as much.
GROWTH_MIB = 96


@pytest.mark.long
@pytest.mark.timeout(280)
def test_hostile_pairs_are_judged_on_time_and_leave_nothing_behind() -> None:
    report = hostile_run(CASES, workers=2, seed=7)  # holds the time limits and that nothing was executed
    assert report["pairs"] == CASES
    assert report["comparisons"] > CASES / 20  # most are decided without a process, these reach one
    assert 0 < report["over_the_limit"] < report["comparisons"] / 2
    first, last = report["memory_mib"][0], report["memory_mib"][-1]
    assert last["driver"] - first["driver"] < GROWTH_MIB


def test_cases_are_a_function_of_seed_and_number() -> None:
    assert list(hostile(1, 20)) == list(hostile(1, 40))[:20] != list(hostile(2, 20))
    cases = [text for pair in hostile(1, 400) for text in pair]
    assert any(len(text) > 100_000 for text in cases)
    assert any("\x00" in text for text in cases)
    assert any(MARKER in text for text in cases)


def test_megabyte_answers_are_not_remembered() -> None:
    text = "7" * 1_000_000
    before = sys.getrefcount(text), _clean.cache_info().currsize
    assert not AnswerEquivalence("math").equivalent(text, "7")
    assert (sys.getrefcount(text), _clean.cache_info().currsize) == before


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("{", "}"), ("[", ""), (r"\sqrt{", "}"), (r"\{", r"\}")])
def test_deep_nesting_is_not_looked_into(opening: str, closing: str) -> None:
    def nested(depth: int) -> str:
        return f"1+{opening * depth}x{closing * depth}"

    assert isinstance(read(nested(MAX_DEPTH + 1)), Phrase)
    assert isinstance(read(nested(MAX_LENGTH // len(opening + closing) - 4)), Phrase)
    if opening in ("(", "{", r"\sqrt{"):
        assert not isinstance(read(nested(MAX_DEPTH)), Phrase)
