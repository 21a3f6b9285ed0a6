"""A vote that ends early has the label of the full group's vote, whatever was to come, in whatever order it came."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_coreward.rewards.early_vote import EarlyVote
from megatron_coreward.rewards.equivalence import AnswerEquivalence, Relation
from megatron_coreward.rewards.voting import majority_vote

Answers = Sequence[str | None]
MARGINS = st.sampled_from([0.0, 0.2, 0.25, 1 / 3, 0.5, 1.0])

# `6:00` may be either of the two; `1/2` has four spellings; the relation between the first three is not transitive.
MATH_ANSWERS = [
    "6 \\text{ a.m.}", "6 \\text{ p.m.}", "6:00",
    "1/2", "0.5", ".5", "\\frac{1}{2}", "2", "2.0", "x+1", "1+x", None, " ",
]  # fmt: skip


def decided_after(answers: Answers, order: Sequence[int], relation: Relation, min_margin: float) -> int:
    """How many answers, in their order of arrival, decide the vote."""
    vote = EarlyVote(len(answers), relation, min_margin)
    for number, sample in enumerate(order):
        if vote.decided:
            return number
        vote.add(sample, answers[sample])
    assert vote.decided
    return len(answers)


def outcome(answers: Answers, equivalence: AnswerEquivalence, min_margin: float) -> tuple[str | None, bool]:
    vote = majority_vote(answers, equivalence, min_margin)
    return vote.label, vote.abstained


@st.composite
def groups(draw: st.DrawFn, alphabet: Sequence[str | None], most: int) -> tuple[list[str | None], list[int]]:
    answers = draw(st.lists(st.sampled_from(alphabet), min_size=1, max_size=most))
    return answers, draw(st.permutations(range(len(answers))))


@given(groups(["1", "2", "3", None, ""], 8), MARGINS)
def test_a_decided_exact_vote_is_the_full_one_and_is_decided_as_soon_as_it_can_be(
    group: tuple[list[str | None], list[int]], min_margin: float
) -> None:
    answers, order = group
    exact = AnswerEquivalence("exact")
    vote = EarlyVote(len(answers), "exact", min_margin)
    for number in range(len(answers) + 1):
        out = order[number:]
        if len(out) <= 3:  # all that may come: each class that was seen, up to three new ones, and no answer
            known = [*sorted({a for s, a in enumerate(answers) if a and s not in out}), "new", "newer", "newest", None]
            outcomes = set()
            for further in itertools.product(known, repeat=len(out)):
                full = [a if s not in out else further[out.index(s)] for s, a in enumerate(answers)]
                outcomes.add(outcome(full, exact, min_margin))
            assert vote.decided == (len(outcomes) == 1)
        if vote.decided:
            as_none = [None if s in out else a for s, a in enumerate(answers)]
            known = [a for s, a in enumerate(answers) if s not in out]
            expected = outcome(answers, exact, min_margin)
            assert outcome(as_none, exact, min_margin) == outcome(known, exact, min_margin) == expected
        if out:
            vote.add(out[0], answers[out[0]])


@settings(deadline=None, max_examples=300)
@given(groups(MATH_ANSWERS, 9), MARGINS, st.sampled_from(["math", "hendrycks"]))
def test_a_decided_vote_has_the_full_ones_label_in_its_spelling_under_every_relation(
    group: tuple[list[str | None], list[int]], min_margin: float, relation: Relation
) -> None:
    answers, order = group
    number = decided_after(answers, order, relation, min_margin)
    as_none = [None if s in order[number:] else a for s, a in enumerate(answers)]
    known = [a for s, a in enumerate(answers) if s not in order[number:]]
    full = outcome(answers, RELATIONS[relation], min_margin)
    assert outcome(as_none, RELATIONS[relation], min_margin) == full
    assert outcome(known, RELATIONS[relation], min_margin) == full


@settings(deadline=None, max_examples=100)
@given(st.data(), MARGINS)
def test_no_answer_that_is_out_changes_a_decided_math_vote(data: st.DataObject, min_margin: float) -> None:
    """The answers that are out are redrawn once the vote is decided: any of them may come."""
    answers, order = data.draw(groups(MATH_ANSWERS[:8], 7))
    number = decided_after(answers, order, "math", min_margin)
    expected = outcome(answers, RELATIONS["math"], min_margin)
    for _ in range(10):
        further = data.draw(st.lists(st.sampled_from(MATH_ANSWERS), min_size=len(answers), max_size=len(answers)))
        full = [further[s] if s in order[number:] else a for s, a in enumerate(answers)]
        assert outcome(full, RELATIONS["math"], min_margin) == expected


@given(groups(["1", "2", None], 8), MARGINS, st.randoms())
def test_the_order_of_arrival_does_not_matter(
    group: tuple[list[str | None], list[int]], min_margin: float, random: object
) -> None:
    answers, order = group
    for number in range(len(answers) + 1):
        one, other = EarlyVote(len(answers), "exact", min_margin), EarlyVote(len(answers), "exact", min_margin)
        for sample in order[:number]:
            one.add(sample, answers[sample])
        for sample in sorted(order[:number]):
            other.add(sample, answers[sample])
        assert one.decided == other.decided


def test_five_of_eight_alike_decide_and_four_do_only_before_everything_else() -> None:
    assert decided_after(["7"] * 8, range(8), "exact", 0.0) == 4  # a tie would go to the class that is first
    assert decided_after(["7"] * 8, range(7, -1, -1), "exact", 0.0) == 5
    assert decided_after(["7"] * 8, range(8), "exact", 0.5) == 6
    assert decided_after(["7", "8"] * 4, range(8), "exact", 0.0) == 7  # the last could only make it a tie


def test_a_vote_that_can_only_abstain_is_decided() -> None:
    assert decided_after(["1", "2", "1", "2", "3", "4", "3", "4"], range(8), "exact", 1.0) == 2


def test_an_earlier_sample_may_still_change_the_spelling_of_a_math_label() -> None:
    answers = ["0.5", ".5", ".5", ".5", ".5"]
    assert decided_after(answers, [1, 2, 3, 4, 0], "math", 0.0) == 5
    assert decided_after(answers, [0, 1, 2, 3, 4], "math", 0.0) == 3
    assert decided_after([".5"] * 5, [1, 2, 3, 4, 0], "exact", 0.0) == 3


def test_a_sample_has_one_answer() -> None:
    vote = EarlyVote(2)
    vote.add(0, "1")
    assert vote.outstanding == {1}
    with pytest.raises(ValueError, match="sample 0 is not among those that are still out"):
        vote.add(0, "1")
    with pytest.raises(ValueError, match="sample 2"):
        vote.add(2, "1")


RELATIONS: dict[Relation, AnswerEquivalence] = {
    "math": AnswerEquivalence("math", num_workers=1),
    "hendrycks": AnswerEquivalence("hendrycks"),
}


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> object:
    yield
    RELATIONS["math"].close()
