r"""The answers of the MATH test set, in the spellings a model may give them."""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.answer_cases import variants
from benchmarks.bench_answers import _look
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.arithmetic import plain_value
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.kinds import Scalar
from megatron_coreward.rewards.reading import read

TEST_FILE = Path(os.environ.get("MEGATRON_COREWARD_MATH_TEST", ""))  # a parquet file in the published format

pytestmark = [
    pytest.mark.skipif(not TEST_FILE.is_file(), reason="MEGATRON_COREWARD_MATH_TEST names no file"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def answers() -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(TEST_FILE, columns=["reward_model"])
    return [row["ground_truth"] for row in table.column("reward_model").to_pylist()]


@pytest.fixture(scope="module")
def equivalence() -> Iterator[AnswerEquivalence]:
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        yield equivalence


def test_every_answer_comes_back_out_of_its_box(answers: list[str]) -> None:
    assert [extract_answer(rf"so it is \boxed{{{answer}}}.") for answer in answers] == [a.strip() for a in answers]


def test_every_answer_equals_its_own_spellings_nearly_always_without_algebra(
    answers: list[str], equivalence: AnswerEquivalence
) -> None:
    compared = equivalence.comparisons
    pairs = [(answer, name, respelt) for answer in sorted(set(answers)) for name, respelt in variants(answer)]
    missed = [pair for pair in pairs if not equivalence.equivalent(pair[2], pair[0])]
    assert missed == []
    assert len(pairs) > 30_000
    assert equivalence.comparisons - compared < 0.01 * len(pairs)


def test_four_fifths_of_the_answers_are_plain_numbers(answers: list[str]) -> None:
    readings = [read(answer) for answer in answers]
    numbers = [item for item in readings if isinstance(item, Scalar) and plain_value(item.node) is not None]
    assert len(numbers) > 0.8 * len(answers)


def _decimal(answer: str) -> float | None:
    """Of 7.5 and `\\$7.50`, which are one amount."""
    with suppress(ValueError):
        return float(answer.replace(r"\$", ""))
    return None


def test_different_answers_are_hardly_ever_equated(answers: list[str], equivalence: AnswerEquivalence) -> None:
    distinct = sorted({_look(answer): answer for answer in answers}.values())
    rng = random.Random(0)
    pairs = [rng.sample(distinct, 2) for _ in range(1000)]
    equated = [pair for pair in pairs if equivalence.equivalent(*pair)]
    assert [pair for pair in equated if _decimal(pair[0]) is None or _decimal(pair[0]) != _decimal(pair[1])] == []
    assert equivalence.timeouts == 0
