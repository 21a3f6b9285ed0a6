"""The samples that a page shows: some questions of some steps, with every rollout, its vote, the label and the reward.

The page holds its data, so it is bounded: what is left out is counted and said on the page.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import majority_vote
from megatron_coreward.telemetry.rollout_dump import ScoredGroup, read_rollouts

T = TypeVar("T")

HEAD_CHARACTERS, TAIL_CHARACTERS = 1600, 600  # of a long text: the answer stands at its end


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run a page shows."""

    steps: int = 16  # spread over the run, the first and the last among them
    questions: int = 8  # of each step, spread over its batch
    characters: int = 6_000_000  # of all texts together


@dataclass(frozen=True, slots=True)
class Samples:
    """Plain JSON for the page, and what is not in it, in words."""

    steps: list[dict[str, Any]]
    left_out: str


def collect_samples(
    dumps: Mapping[int, Path], equivalence: AnswerEquivalence, min_margin: float, limits: Limits
) -> Samples:
    """Reads the dumps of a spread of steps and takes a spread of questions of each."""
    steps = spread(list(dumps), limits.steps)
    left, total, cut, shown, result = limits.characters, 0, 0, 0, []
    damaged: list[int] = []
    for place, step in enumerate(steps):
        try:
            questions = _questions(read_rollouts(dumps[step]))
        except InputError:  # cut off, as a full disk or a copy that was broken off leaves it
            damaged.append(step)
            continue
        budget = left // (len(steps) - place)
        total += len(questions)
        taken: list[dict[str, Any]] = []
        equivalence.compare([item.group.answers for groups in spread(questions, limits.questions) for item in groups])
        for groups in spread(questions, limits.questions):
            entry, size, num_cut = _entry(groups, equivalence, min_margin)
            if taken and size > budget:
                break
            taken.append(entry)
            budget, left, cut = budget - size, left - size, cut + num_cut
        shown += len(taken)
        result.append({"step": step, "of": len(questions), "questions": taken})
    said = [f"{len(result)} of {len(dumps)} dumped steps", f"{shown} of their {total} questions"]
    if cut:
        said.append(f"{cut} long texts shortened in the middle")
    if damaged:
        said.append(f"the rollouts of steps {', '.join(map(str, damaged))} cannot be read")
    return Samples(result, f"Shown: {', '.join(said)}." if dumps else "This run kept no rollouts.")


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `count` of the items, evenly spread, the first and the last among them (the last alone for one)."""
    if len(items) <= most:
        return list(items)
    if most <= 1:
        return list(items[-1:]) if most == 1 else []
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def shorten(text: str) -> str:
    """A long text without its middle, with a count in its place."""
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n[... {left_out} characters ...]\n{text[-TAIL_CHARACTERS:]}"


def _questions(scored: Sequence[ScoredGroup]) -> list[list[ScoredGroup]]:
    """The groups of each question, in the order of the batch."""
    order: dict[str, int] = {}
    for item in scored:
        order.setdefault(item.group.uid, len(order))
    ranked = sorted(scored, key=lambda item: order[item.group.uid])
    return [list(groups) for _, groups in groupby(ranked, key=lambda item: item.group.uid)]


def _entry(
    groups: Sequence[ScoredGroup], equivalence: AnswerEquivalence, min_margin: float
) -> tuple[dict[str, Any], int, int]:
    """A question as the page reads it, its size in characters, and how many texts were shortened."""
    entry = {
        "uid": groups[0].group.uid,
        "ground_truth": next((item.ground_truth for item in groups if item.ground_truth is not None), None),
        "groups": [_group(item, equivalence, min_margin) for item in groups],
    }
    texts = list(_texts(groups))
    size = sum(min(len(text), HEAD_CHARACTERS + TAIL_CHARACTERS) for text in texts)
    return entry, size, sum(shorten(text) != text for text in texts)


def _texts(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    for item in groups:
        yield item.group.prompt.text
        yield from (completion.text for completion in item.group.completions)


def _group(item: ScoredGroup, equivalence: AnswerEquivalence, min_margin: float) -> dict[str, Any]:
    vote = majority_vote(item.group.answers, equivalence, min_margin)
    winners = set(vote.winners)
    return {
        "view": item.group.view,
        "role": item.group.role,
        "prompt": shorten(item.group.prompt.text),
        "vote": vote.label,
        "share": round(vote.share, 4),
        "tie": vote.tie,
        "abstained": vote.abstained,
        "label": item.label,
        "rollouts": [
            {
                "text": shorten(completion.text),
                "answer": completion.answer,
                "tokens": len(completion.token_ids),
                "cut": completion.finish_reason == "length",
                "winner": place in winners,
                "reward": None if item.rewards is None else _number(item.rewards[place]),
                "advantage": None if item.advantages is None else _number(item.advantages[place]),
            }
            for place, completion in enumerate(item.group.completions)
        ],
    }


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
