"""Classes of a group: all members equivalent, independent of order, and the relation's own where it is transitive."""

import random

from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.rewards.classes import cliques
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import majority_vote


def grouped(forms: list[str], counts: list[int], edges: set[frozenset[int]]) -> set[frozenset[str]]:
    class_of = cliques(forms, counts, lambda i, j: frozenset((i, j)) in edges)
    return {frozenset(forms[i] for i in range(len(forms)) if class_of[i] == c) for c in set(class_of)}


def test_what_may_be_either_joins_the_larger_of_two_that_differ() -> None:
    either = {frozenset((0, 1)), frozenset((0, 2))}
    assert grouped(["6", "6 am", "6 pm"], [3, 1, 2], either) == {frozenset({"6 am"}), frozenset({"6", "6 pm"})}
    assert grouped(["6", "6 am", "6 pm"], [3, 2, 1], either) == {frozenset({"6 pm"}), frozenset({"6", "6 am"})}


@st.composite
def relations(draw: st.DrawFn) -> tuple[list[str], list[int], set[frozenset[int]]]:
    number = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(1, 9), min_size=number, max_size=number))
    pairs = [frozenset((i, j)) for i in range(number) for j in range(i)]
    edges = draw(st.sets(st.sampled_from(pairs))) if pairs else set()
    return [f"answer {i}" for i in range(number)], counts, edges


@given(relations(), st.randoms(use_true_random=False))
def test_classes_hold_equivalent_answers_only_and_do_not_depend_on_order(
    relation: tuple[list[str], list[int], set[frozenset[int]]], rng: random.Random
) -> None:
    forms, counts, edges = relation
    classes = grouped(forms, counts, edges)
    index = {form: i for i, form in enumerate(forms)}
    for members in classes:
        assert all(a == b or frozenset((index[a], index[b])) in edges for a in members for b in members)
    order = list(range(len(forms)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    shuffled = {frozenset(place[i] for i in edge) for edge in edges}
    assert grouped([forms[i] for i in order], [counts[i] for i in order], shuffled) == classes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_transitive_relation_keeps_its_classes(of_class: list[int]) -> None:
    forms = [f"answer {i}" for i in range(len(of_class))]
    class_of = cliques(forms, [1] * len(forms), lambda i, j: of_class[i] == of_class[j])
    for i in range(len(forms)):
        for j in range(len(forms)):
            assert (class_of[i] == class_of[j]) == (of_class[i] == of_class[j])


AMBIGUOUS = [
    "3",
    r"3\text{ cm}",
    r"3\text{ cm}^2",
    "x=3",
    "y=3",
    "100,200",
    "100200",
    "200,100",
    "6:30",
    r"6:30\text{ am}",
]


@given(st.lists(st.sampled_from([*AMBIGUOUS, r"6:30\text{ pm}", "(100,200)"]), max_size=12), st.randoms())
def test_the_vote_of_a_group_does_not_depend_on_the_order_of_its_answers(
    answers: list[str], rng: random.Random
) -> None:
    equivalence = AnswerEquivalence("math")

    def partition(given: list[str]) -> set[frozenset[str]]:
        classes = equivalence.classes(given)
        return {frozenset(a for a, c in zip(given, classes, strict=True) if c == wanted) for wanted in set(classes)}

    vote, found = majority_vote(answers, equivalence), partition(answers)
    for members in found:
        assert all(equivalence.equivalent(a, b) for a in members for b in members)
    shuffled = list(answers)
    rng.shuffle(shuffled)
    again = majority_vote(shuffled, equivalence)
    assert partition(shuffled) == found
    assert (again.share, again.margin, again.num_classes) == (vote.share, vote.margin, vote.num_classes)
    assert equivalence.comparisons == 0
