"""The embedded task is right: what its texts say, read by a reader of its own, is what its answers say."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_coreward.data.parquet import read_rows
from megatron_coreward.demo.task import MAX_QUESTIONS, SOURCE, Question, Splits, Sum, make_splits, write_parquet
from megatron_coreward.errors import InputError
from megatron_coreward.types import VIEWS

# What each step's wording does to the count, written from the stories' meaning and not taken from the templates.
MORE: tuple[str, ...] = (
    "finds",
    "buys",
    "wins",
    "put in",
    "add",
    "are born",
    "are bought",
    "get on",
    "board",
    "flow in",
    "pour in",
)
MORE += ("Income of", "Deposit of")
LESS: tuple[str, ...] = (
    "loses",
    "sells",
    "gives away",
    "take out",
    "remove",
    "are given up",
    "run off",
    "get off",
    "leave",
)
LESS += ("leak out", "drain off", "Bill of", "Rent of")


def read_text(text: str) -> int:
    """The answer to a question as a reader finds it: numbers in order, each step's sign from its words."""
    start, *steps = re.findall(r"\d+", text)
    phrases = re.findall(rf"(?:({'|'.join(MORE)})|({'|'.join(LESS)}))(?![a-z])", text)
    assert len(phrases) == len(steps) == 2, text
    total = int(start)
    for number, (more, _) in zip(steps, phrases, strict=True):
        total += int(number) if more else -int(number)
        assert total >= 0, text
    return total


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return make_splits(7, 2000, 500, 2000)


def test_both_texts_of_a_question_ask_for_its_result(splits: Splits) -> None:
    for question in splits.train + splits.heldout:
        for view in VIEWS:
            assert read_text(question.texts[view]) == question.sum.result, question


def test_every_wording_of_every_scenario_occurs_and_is_read_right() -> None:
    texts = [text for question in make_splits(0, 5000, 0, 0).train for text in question.texts.values()]
    for phrase in MORE + LESS:
        assert any(phrase in text for text in texts), phrase


@given(
    operands=st.tuples(st.integers(10, 99), st.integers(2, 9), st.integers(2, 9)),
    operations=st.tuples(st.sampled_from("+-"), st.sampled_from("+-")),
)
def test_a_response_is_true_arithmetic_and_ends_with_the_boxed_result(
    operands: tuple[int, int, int], operations: tuple[str, str]
) -> None:
    drawn = Sum(operands, operations)  # type: ignore[arg-type]
    a, b, c = operands
    assert drawn.result == eval(f"{a}{operations[0]}{b}{operations[1]}{c}")
    first, second, boxed = re.fullmatch(r"(.*), (.*)\. \\boxed\{(-?\d+)\}", drawn.response).groups()  # type: ignore[union-attr]
    for equation in (first, second):
        left, right = equation.split("=")
        assert eval(left) == int(right)
    assert first.startswith(f"{a}{operations[0]}{b}=")
    assert second == f"{drawn.subtotal}{operations[1]}{c}={drawn.result}"
    assert int(boxed) == drawn.result


def test_sft_responses_answer_their_own_question_and_the_views_take_turns(splits: Splits) -> None:
    for text, response in splits.sft:
        assert response.endswith(f"\\boxed{{{read_text(text)}}}")
    openings = [{text.split()[0] for text, _ in splits.sft[start::2]} for start in (0, 1)]
    assert openings[0] == {"There", "A", "Tom", "Anna", "Ben", "Mia", "Leo", "Eva"}
    assert openings[1] == {"On", "A", "The"}


def test_a_rephrasing_shares_the_numbers_and_next_to_no_words(splits: Splits) -> None:
    for question in splits.train + splits.heldout:
        original, rephrased = (question.texts[view] for view in VIEWS)
        assert re.findall(r"\d+", original) == re.findall(r"\d+", rephrased)
        shared = words(original) & words(rephrased)
        assert len(shared) <= 3, shared
        assert shared <= {"a", "are", "in", "how", "of", "is", "off", "out"}


def test_operands_are_in_their_ranges_and_all_operations_are_equally_frequent(splits: Splits) -> None:
    assert all(10 <= question.sum.operands[0] <= 99 for question in splits.train)
    assert all(2 <= operand <= 9 for question in splits.train for operand in question.sum.operands[1:])
    pairs = [question.sum.operations for question in splits.train]
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 4
    assert all(abs(count - 500) < 100 for count in counts.values())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), sizes=st.tuples(*[st.integers(0, 200)] * 3))
def test_splits_are_disjoint_have_their_sizes_and_depend_on_the_seed_alone(
    seed: int, sizes: tuple[int, int, int]
) -> None:
    splits = make_splits(seed, *sizes)
    assert (len(splits.train), len(splits.heldout), len(splits.sft)) == sizes
    assert splits == make_splits(seed, *sizes)
    sums = [question.sum for question in splits.train + splits.heldout]
    texts = [text for question in splits.train + splits.heldout for text in question.texts.values()]
    texts += [text for text, _ in splits.sft]
    assert len(set(sums)) == len(sums)
    assert len(set(texts)) == len(texts)
    # The equations of a response are its operands and operations.
    equations = {question.sum.response for question in splits.train + splits.heldout}
    assert not equations & {response for _, response in splits.sft}


def test_the_heldout_questions_do_not_change_with_the_other_sizes() -> None:
    assert make_splits(3, 10, 20, 30).heldout == make_splits(3, 500, 20, 0).heldout
    assert make_splits(3, 10, 20, 30).heldout != make_splits(4, 10, 20, 30).heldout


def test_every_kind_of_sum_is_frequent_enough_for_the_largest_splits() -> None:
    """A quarter of all questions may subtract twice; drawing them must not run dry."""
    twice_subtracted = sum(a >= b + c for a in range(10, 100) for b in range(2, 10) for c in range(2, 10))
    assert twice_subtracted > 1.2 * MAX_QUESTIONS / 4


@pytest.mark.parametrize("sizes", [(-1, 0, 0), (0, -5, 0), (MAX_QUESTIONS, 0, 1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"found .*; allowed: "):
        make_splits(0, *sizes)


def test_files_pair_up_and_hold_the_questions(splits: Splits, tmp_path: Path) -> None:
    files = write_parquet(tmp_path / "data", splits)
    expected: list[tuple[Path, tuple[Question, ...], int]] = [
        (files.train, splits.train, 0),
        (files.train_rephrased, splits.train, 1),
        (files.heldout, splits.heldout, 0),
        (files.heldout_rephrased, splits.heldout, 1),
    ]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(path.name for path, _, _ in expected)
    for path, questions, view in expected:
        rows = read_rows(path)
        assert [row.messages for row in rows] == [
            ({"role": "user", "content": question.texts[VIEWS[view]]},) for question in questions
        ]
        assert [row.ground_truth for row in rows] == [str(question.sum.result) for question in questions]
        assert all(second.index == first.index + 1 for first, second in pairwise(rows))  # type: ignore[operator]
        assert rows[0].uid == f"{SOURCE}/0"
