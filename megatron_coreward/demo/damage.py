"""Rephrasings that went wrong, made on purpose: how much of that can Co-rewarding-I bear?

A share of the rephrasings is replaced, a third of it in each way:

| kind | what replaces the rephrasing |
|---|---|
| `numbers` | itself with one number changed: a question with another answer |
| `copy` | the question itself: the two views are one, and vote as one |
| `off_topic` | the rephrasing of another question |

Invariants (tests/demo/test_damage.py): which questions are damaged depends on the seed alone, and a smaller share
damages some of those of a larger one; the ground truths stay those of the questions.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from megatron_coreward.data import rephrasing
from megatron_coreward.demo.task import Question

Kind = Literal["numbers", "copy", "off_topic"]


def damage(questions: Sequence[Question], share: float, seed: int) -> list[Question]:
    """The questions, a share of them with a rephrasing that went wrong, in the same order.

    Raises ValueError for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: found {share}; allowed: 0 to 1")
    generator = random.Random(seed)
    order = list(range(len(questions)))
    generator.shuffle(order)
    damaged = list(questions)
    for place, index in enumerate(order):
        wrong = _wrong(get_args(Kind)[place % 3], index, questions, generator)
        if place < round(share * len(questions)):
            damaged[index] = replace(questions[index], texts={**questions[index].texts, "rephrased": wrong})
    return damaged


def passing(questions: Sequence[Question]) -> list[Question]:
    """Those whose rephrasing passes the filter of `rephrase` (`data.rephrasing.check`)."""
    return [q for q in questions if rephrasing.check(q.texts["original"], q.texts["rephrased"]).passed]


def _wrong(kind: Kind, index: int, questions: Sequence[Question], generator: random.Random) -> str:
    question = questions[index]
    if kind == "copy":
        return question.texts["original"]
    if kind == "off_topic":
        other = (index + generator.randrange(1, len(questions))) % len(questions)
        return questions[other].texts["rephrased"]
    text = question.texts["rephrased"]
    found = generator.choice(list(re.finditer(r"\d+", text)))
    others = [n for n in (range(10, 100) if len(found[0]) == 2 else range(2, 10)) if str(n) != found[0]]
    return f"{text[: found.start()]}{generator.choice(others)}{text[found.end() :]}"
