"""Anchor questions: training questions whose majority was clear at first, drawn again while training goes on.

A policy that learns from its own votes may lock in wrong answers while its reward, its length and its certainty look
well. What it then forgets are answers that it was sure of. So before the first step, some training questions are
drawn from the policy of the start, and those with a clear majority are kept as anchors; every few steps, the policy
draws them again. No ground truth is read: what is compared is the policy with its own past. Methods that read
ground truths are the exception: they correct clear majorities that are wrong, so for them only right ones are anchors.

Invariants, each held by a test: the anchors are a function of the start, the seed and the settings; a draw is a
function of the weights (its seeds are always the same); opening for `first_step` forgets the draws of that step and of
later ones, so a resumed run draws what an uninterrupted one would.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_coreward.config.guard import GuardSettings
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.voting import majority_vote
from megatron_coreward.telemetry.anchor_draws import read_draws
from megatron_coreward.telemetry.files import append_line, replaced_whole, writing
from megatron_coreward.trainer.sampling import SamplingEngines, sample_groups
from megatron_coreward.types import Problem, RolloutGroup

CANDIDATES = 2  # questions that are asked at first, for each anchor that is wanted
FIRST_ROLLOUTS = 8  # of each candidate: its first majority
CLEAR = 0.75  # share of them that makes a majority clear
FIRST_DRAW, LATER_DRAWS = 0, 1  # what stands for the step in the seeds of rollouts, for training steps begin at 1

Draw = Callable[[Sequence[Problem], int, int], list[RolloutGroup]]  # questions, rollouts of each, step of the seeds


class Anchors:
    """The anchor questions of a run, and how far their answers have moved."""

    def __init__(
        self,
        path: Path,
        problems: Sequence[Problem],
        settings: GuardSettings,
        equivalence: AnswerEquivalence,
        first_step: int = 0,
        *,
        only_right: bool = False,
    ) -> None:
        """Args:
            problems: the training questions.
            first_step: that comes next; 0: nothing has been drawn.
            only_right: a majority must be the ground truth; for methods that read ground truths anyway.

        Raises InputError if a whole line of the file is not a draw.
        """
        self._problems, self._settings, self._equivalence = problems, settings, equivalence
        self._path, self._only_right = path, only_right
        self._labels: dict[str, str] = {}
        self._agreements: list[float] = []  # of the draws so far
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path, first_step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    @property
    def chosen(self) -> bool:
        """Whether there are any: they are chosen before the first step, and at no other time."""
        return bool(self._labels)

    def due(self, step: int) -> bool:
        """Whether the anchors are drawn after this step; they are chosen after step 0, before the first one."""
        return step == 0 if not self._labels else step % self._settings.anchor_every == 0

    def observe(self, step: int, draw: Draw) -> dict[str, float]:
        """Draws the anchors and returns how they answer, compared with the start; at step 0, it chooses them before.

        `anchor/moved_share`: anchors whose majority is another answer than at first, or none; `anchor/agreement`: their
        rollouts with the answer of the first majority; `anchor/kept`: see `kept`.
        `anchor/questions`: how many anchors there are; without any, the others are left out.

        Raises InputError at step 0 if there are fewer than `guard.min_anchors`; nothing is written then.
        """
        row: dict[str, Any] = {"step": step}
        if step == 0:
            labels = self._choose(draw)
            if len(labels) < self._settings.min_anchors:
                raise InputError(too_few(len(labels), self._settings.min_anchors, only_right=self._only_right))
            row["labels"] = self._labels = labels
        anchors = [problem for problem in self._problems if problem.uid in self._labels]
        groups = draw(anchors, self._settings.anchor_rollouts, LATER_DRAWS) if anchors else []
        row["answers"] = {group.uid: group.answers for group in groups}
        metrics = self._metrics(row["answers"])
        with writing(self._path):
            append_line(self._descriptor, json.dumps(row).encode() + b"\n", self._path)
        return metrics | {"anchor/questions": float(len(self._labels))}

    def close(self) -> None:
        os.close(self._descriptor)

    def _choose(self, draw: Draw) -> dict[str, str]:
        """The first questions of the data with a clear majority, and that majority."""
        candidates = self._problems[: CANDIDATES * self._settings.anchors]
        labels: dict[str, str] = {}
        for group in draw(candidates, FIRST_ROLLOUTS, FIRST_DRAW):
            vote = majority_vote(group.answers, self._equivalence)
            if vote.label is not None and vote.share >= CLEAR:
                labels[group.uid] = vote.label
        if self._only_right:
            labels = self._right(labels)
        return dict(islice(labels.items(), self._settings.anchors))

    def _right(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Those that are the ground truth."""
        truths = {problem.uid: problem.ground_truth for problem in self._problems if problem.uid in labels}
        self._equivalence.compare([(label, truths[uid]) for uid, label in labels.items()])
        return {uid: label for uid, label in labels.items() if self._equivalence.equivalent(label, truths[uid])}

    def _metrics(self, answers: Mapping[str, Sequence[str | None]]) -> dict[str, float]:
        """Those of a draw, after all earlier ones."""
        if not answers:
            return {}
        self._equivalence.compare([(self._labels[uid], *given) for uid, given in answers.items()])
        moved = [
            not self._equivalence.equivalent(majority_vote(given, self._equivalence).label, self._labels[uid])
            for uid, given in answers.items()
        ]
        agreeing = [
            self._equivalence.equivalent(answer, self._labels[uid])
            for uid, given in answers.items()
            for answer in given
        ]
        self._agreements.append(fmean(agreeing))
        return {
            "anchor/moved_share": fmean(moved),
            "anchor/agreement": self._agreements[-1],
            "anchor/kept": kept(self._agreements),
        }

    def _read(self, path: Path, first_step: int) -> None:
        draws, part = read_draws(path)
        known = [draw for draw in draws if draw.step < first_step]
        for draw in known:
            self._labels = draw.labels or self._labels
            self._metrics(draw.answers)  # for the agreements so far
        if part or len(known) != len(draws):
            with replaced_whole(path) as temporary:
                temporary.write_bytes(b"".join(draw.line + b"\n" for draw in known))


def too_few(found: int, allowed: int, *, only_right: bool = False) -> str:
    """What is said of a model that is sure of too little, or wrongly."""
    if only_right:
        return (
            f"data.train_files: found {found} anchor questions, on which the model has a clear majority that is the "
            f"ground truth, among those that were asked; allowed: {allowed} or more (guard.min_anchors, which may be 0)"
        )
    return (
        f"data.train_files: found {found} anchor questions, on which the model has a clear majority, among those that "
        f"were asked; allowed: {allowed} or more (guard.min_anchors). A model that is sure of so little has no labels "
        "to learn from: take a stronger one or easier questions"
    )


def kept(agreements: Sequence[float]) -> float:
    """The agreement of the last draw, or of the last two if that is more, as a share of the most that any two draws in
    a row have had; at most 1.

    Two, because one draw of a few hundred rollouts is noisy, and the most of many noisy numbers is too much. The last
    one alone, because answers that have come back are not lost.
    """
    pairs = [fmean(agreements[max(0, place - 1) : place + 1]) for place in range(len(agreements))]
    return min(1.0, max(pairs[-1], agreements[-1]) / max(pairs)) if max(pairs) > 0 else 1.0


def draw_anchors(
    config: RunConfig, engines: SamplingEngines, version: int, problems: Sequence[Problem], n: int, seed_step: int
) -> list[RolloutGroup]:
    """A draw by the engines of a run, as training samples; `version` is that of the policy's weights."""
    return sample_groups(
        engines,
        problems,
        ("original",),
        "policy",
        n=n,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_tokens=config.rollout.max_response_tokens,
        version=version,
        step=seed_step,
        seed=config.seed,
        answer_formats=config.rewards.answer_formats,
        stop_at=config.rewards.stop_at,
        stop=config.rollout.stop,
    )
