"""The answers of the MATH test set, in the spellings a model may give them."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rewards.latex import canonical

TEST_FILE = Path(__file__).parents[2] / "../shared/data/math/test.parquet"

pytestmark = [
    pytest.mark.skipif(not TEST_FILE.exists(), reason="the MATH files are not beside the checkout"),
    pytest.mark.timeout(300),
]

VARIANTS = {
    "display fractions": lambda answer: answer.replace(r"\frac", r"\dfrac"),
    "dollar signs": lambda answer: f"${answer}$",
    "assignment": lambda answer: answer if re.search(r"[=<>]|\\in\b", answer) else f"x = {answer}",
    "full stop": lambda answer: f"{answer}.",
    "white space": lambda answer: f"  {answer} \n",
    "sized brackets": lambda answer: answer.replace("(", r"\left(").replace(")", r"\right)"),
    "thin spaces": lambda answer: answer if r"\!" in answer else answer.replace(", ", r",\; "),
}


@pytest.fixture(scope="module")
def answers() -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(TEST_FILE, columns=["reward_model"])
    return [row["ground_truth"] for row in table.column("reward_model").to_pylist()]


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge("math", timeout_s=60.0) as judge:
        yield judge


def test_every_answer_comes_back_out_of_its_box(answers: list[str]) -> None:
    assert [extract_answer(rf"so it is \boxed{{{answer}}}.") for answer in answers] == [a.strip() for a in answers]


@pytest.mark.parametrize("variant", VARIANTS)
def test_surface_variants_need_no_algebra(answers: list[str], judge: Judge, variant: str) -> None:
    compared = judge.comparisons
    missed = [answer for answer in answers if not judge.equivalent(VARIANTS[variant](answer), answer)]
    assert missed == []
    assert judge.comparisons == compared


def test_four_fifths_of_the_answers_are_plain_numbers(answers: list[str]) -> None:
    assert sum(canonical(answer).kind == "number" for answer in answers) > 0.8 * len(answers)


def test_different_answers_are_hardly_ever_equated(answers: list[str], judge: Judge) -> None:
    distinct = sorted({canonical(answer).text for answer in answers})
    rng = random.Random(0)
    pairs = [rng.sample(distinct, 2) for _ in range(100)]
    equated = [pair for pair in pairs if judge.equivalent(*pair)]
    assert equated == []
    assert judge.timeouts == 0
