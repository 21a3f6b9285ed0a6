"""One group, one vote: ties, gaps, margins, and what the order of the answers may change."""

import random
from collections import Counter
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import Vote, majority_vote

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", "1.0", None, ""]), max_size=12)


def test_the_largest_class_wins() -> None:
    assert majority_vote(["3", "5", "5", None, "5", "3", "7", ""]) == Vote(
        label="5",
        share=3 / 8,
        margin=1 / 8,
        tie=False,
        abstained=False,
        num_rollouts=8,
        num_answers=6,
        num_classes=3,
        winners=(1, 2, 4),
        entropy=pytest.approx((1 / 2 * log(2) + 1 / 3 * log(3) + 1 / 6 * log(6)) / log(8)),
    )


def test_the_entropy_of_a_vote_is_0_if_all_agree_and_1_if_no_two_do() -> None:
    assert majority_vote(["4"] * 4).entropy == majority_vote(["4", None]).entropy == majority_vote(["4"]).entropy == 0
    assert majority_vote(["1", "2", "3", "4"]).entropy == pytest.approx(1)


def test_a_tie_goes_to_the_class_that_was_seen_first() -> None:
    vote = majority_vote(["9", "2", "7", "7", "2"])
    assert (vote.label, vote.tie, vote.margin, vote.winners) == ("2", True, 0.0, (1, 4))


def test_no_answer_never_wins_not_even_as_the_largest_group() -> None:
    vote = majority_vote([None, "", None, "4", " "])
    assert (vote.label, vote.share, vote.margin, vote.num_answers) == ("4", 0.2, 0.2, 1)


@pytest.mark.parametrize("answers", [[], [None], [None, "", "  "]])
def test_without_any_answer_there_is_no_label(answers: list[str | None]) -> None:
    vote = majority_vote(answers, min_margin=1.0)
    assert vote == Vote(None, 0.0, 0.0, False, False, len(answers), 0, 0, ())


def test_a_single_class_has_its_own_share_as_margin() -> None:
    vote = majority_vote(["4", "4", None, None])
    assert (vote.share, vote.margin, vote.tie) == (0.5, 0.5, False)


@pytest.mark.parametrize(("min_margin", "label"), [(0.0, "1"), (0.3, "1"), (0.31, None), (1.0, None)])
def test_a_vote_below_the_margin_abstains_and_says_so(min_margin: float, label: str | None) -> None:
    vote = majority_vote(["1"] * 5 + ["2"] * 2 + [None] * 3, min_margin=min_margin)
    assert vote.label == label
    assert vote.abstained is (label is None)
    assert bool(vote.winners) is (label is not None)
    assert (vote.share, vote.margin) == (0.5, 0.3)


@pytest.mark.parametrize("min_margin", [-0.1, 1.1, float("nan")])
def test_a_margin_outside_of_its_range_is_refused(min_margin: float) -> None:
    with pytest.raises(ValueError, match="min_margin"):
        majority_vote(["1"], min_margin=min_margin)


def test_the_relation_decides_what_counts_together() -> None:
    answers = ["0.25", "1/3", r"\frac{1}{4}", "1/3", ".250"]
    assert majority_vote(answers).label == "1/3"
    vote = majority_vote(answers, AnswerEquivalence("math"))
    assert (vote.label, vote.share, vote.winners) == ("0.25", 0.6, (0, 2, 4))  # the first spelling stands for all


@given(ANSWERS, st.randoms())
def test_order_changes_the_label_only_in_a_tie_or_among_spellings(
    answers: list[str | None], rng: random.Random
) -> None:
    equivalence = AnswerEquivalence("math")
    shuffled = list(answers)
    rng.shuffle(shuffled)
    one, other = majority_vote(answers, equivalence), majority_vote(shuffled, equivalence)
    assert (one.share, one.margin, one.tie) == (other.share, other.margin, other.tie)
    assert (one.num_answers, one.num_classes, len(one.winners)) == (
        other.num_answers,
        other.num_classes,
        len(other.winners),
    )
    assert one.tie or one.label is None or equivalence.equivalent(one.label, other.label)


@given(ANSWERS, st.floats(0, 1))
def test_the_vote_is_what_counting_says(answers: list[str | None], min_margin: float) -> None:
    vote = majority_vote(answers, min_margin=min_margin)
    counts = Counter(answer for answer in answers if answer)
    top = [count for _, count in counts.most_common()] + [0, 0]
    assert vote.share * len(answers) == pytest.approx(top[0])
    assert vote.margin * len(answers) == pytest.approx(top[0] - top[1])
    assert vote.tie is (top[0] == top[1] > 0)
    assert vote.num_classes == len(counts)
    if vote.label is not None:
        assert counts[vote.label] == top[0] == len(vote.winners)
        assert all(answers[i] == vote.label for i in vote.winners)
        assert all(answers.index(a) >= vote.winners[0] for a, count in counts.items() if count == top[0])
    else:
        assert not counts or vote.margin < min_margin
