"""Damaged rephrasings are as many as asked for, wrong in the three ways, and mostly refused by the filter."""

import re

import pytest

from megatron_coreward.data.rephrasing import check
from megatron_coreward.demo.damage import damage, passing
from megatron_coreward.demo.task import Question, make_splits

QUESTIONS = list(make_splits(1, 120, 0, 0).train)


def changed(questions: list[Question]) -> dict[int, str]:
    return {
        place: after.texts["rephrased"]
        for place, (before, after) in enumerate(zip(QUESTIONS, questions, strict=True))
        if before.texts["rephrased"] != after.texts["rephrased"]
    }


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5])
def test_a_share_of_the_rephrasings_is_damaged_and_nothing_else(share: float) -> None:
    damaged = damage(QUESTIONS, share, seed=3)
    assert len(changed(damaged)) == round(share * len(QUESTIONS))
    assert [q.sum for q in damaged] == [q.sum for q in QUESTIONS]
    assert [q.texts["original"] for q in damaged] == [q.texts["original"] for q in QUESTIONS]


def test_a_third_each_are_copies_other_questions_and_changed_numbers() -> None:
    found = changed(damage(QUESTIONS, 0.5, seed=3))
    copies = [place for place, text in found.items() if text == QUESTIONS[place].texts["original"]]
    others = {q.texts["rephrased"] for q in QUESTIONS}
    off_topic = [place for place, text in found.items() if text in others]
    numbers = sorted(found.keys() - {*copies, *off_topic})
    assert len(copies) == len(off_topic) == len(numbers) == 20
    for place in numbers:
        before, after = (
            re.findall(r"\d+|[^\d]+", text) for text in (QUESTIONS[place].texts["rephrased"], found[place])
        )
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_a_smaller_share_damages_some_of_those_of_a_larger_one_in_the_same_way() -> None:
    assert changed(damage(QUESTIONS, 0.1, seed=3)).items() <= changed(damage(QUESTIONS, 0.5, seed=3)).items()
    assert changed(damage(QUESTIONS, 0.1, seed=4)) != changed(damage(QUESTIONS, 0.1, seed=3))


def test_the_filter_keeps_all_good_rephrasings_and_refuses_nearly_all_damaged_ones() -> None:
    assert passing(QUESTIONS) == QUESTIONS
    damaged = damage(QUESTIONS, 0.5, seed=3)
    kept = passing(damaged)
    assert {q.sum for q in kept} >= {q.sum for q, d in zip(QUESTIONS, damaged, strict=True) if q == d}
    wrong = [q for q, d in zip(damaged, QUESTIONS, strict=True) if q != d and q in kept]
    assert len(wrong) <= 3
    assert all(check(q.texts["original"], q.texts["rephrased"]).passed for q in wrong)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_nothing_and_everything(share: float) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        damage(QUESTIONS, share, seed=1)
