"""Pairs of answers with the right verdict, by kind: reported mistakes of graders, and our own of the same kinds."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.equivalence import AnswerEquivalence

HERE = Path(__file__).parent

pytestmark = pytest.mark.timeout(300)


def rows() -> list[dict[str, str]]:
    with (HERE / "answer_pairs.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


KINDS = sorted({row["kind"] for row in rows()})


@pytest.fixture(scope="module")
def equivalence() -> Iterator[AnswerEquivalence]:
    with AnswerEquivalence("math", timeout_s=60.0) as equivalence:
        yield equivalence


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_a_kind_have_their_verdict_in_both_directions(equivalence: AnswerEquivalence, kind: str) -> None:
    pairs = [(row["answer"], row["other"], row["verdict"] == "same") for row in rows() if row["kind"] == kind]
    equivalence.compare([(a, b) for a, b, _ in pairs])
    wrong = [
        (a, b, same)
        for a, b, same in pairs
        if equivalence.equivalent(a, b) is not same or equivalence.equivalent(b, a) is not same
    ]
    assert wrong == []


def test_every_answer_is_itself(equivalence: AnswerEquivalence) -> None:
    answers = {answer for row in rows() for answer in (row["answer"], row["other"])}
    assert [answer for answer in answers if not equivalence.equivalent(answer, f" {answer} ")] == []


@pytest.mark.parametrize("line", (HERE / "extraction.jsonl").read_text().splitlines())
def test_reported_texts_give_their_answer(line: str) -> None:
    case = json.loads(line)
    assert extract_answer(case["text"], case["forms"]) == case["answer"]
