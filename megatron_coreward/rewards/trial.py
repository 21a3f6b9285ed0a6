"""A method of somebody's own judges a few made-up rollouts before a run starts: does it do what it says?"""

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from megatron_coreward.errors import InputError
from megatron_coreward.rewards.context import BatchRewardContext
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods.base import GroupReward, Method
from megatron_coreward.types import Completion, Prompt, Role, RolloutGroup, TokenStats, View

# Of one group each: the usual case, and those on which a division or an index may fail.
TRIALS: tuple[tuple[str | None, ...], ...] = (
    ("1", "1", "2", None),
    (None, None, None, None),  # nobody answers
    ("1", "1", "1", "1"),  # all agree
    ("1",),  # a single rollout
)


def try_method(name: str, method: Method, votes_end_early: bool = False) -> None:
    """Lets a method judge one question in each view that it samples, with what its needs name and nothing else.

    Args:
        votes_end_early: whether the run has `teacher.early_stop`.

    Raises:
        InputError: it fails, reads what its needs do not name, returns no reward for each rollout, or advantages that
            it does not announce.
    """
    for answers in TRIALS:
        _try_group(name, method, answers, votes_end_early)


def _try_group(name: str, method: Method, answers: Sequence[str | None], votes_end_early: bool) -> None:
    views = method.needs.views or ("original",)
    groups = [_group(view, "policy", answers) for view in views]
    values = [np.linspace(0.1, 1.0, len(c.token_ids), dtype=np.float32) for g in groups for c in g.completions]
    context = BatchRewardContext(
        method.needs,
        AnswerEquivalence("exact"),
        policy_groups=groups,
        teacher_groups=[_group(view, "teacher", answers) for view in method.needs.sampled_views("teacher")],
        token_stats=TokenStats(values, values, values) if method.needs.token_stats else None,
        ground_truths={"trial/0": "1"} if method.needs.ground_truth else None,
        votes_end_early=votes_end_early,
    )
    for group in groups:
        try:
            judged = method.score(group, context)
        except PermissionError as error:
            raise InputError(f"method: {name}: {error}") from None
        except Exception as error:
            raise InputError(
                f"method: {name}: failed on made-up rollouts with {type(error).__name__}: {error} (their answers: "
                f"{answers})"
            ) from error
        problem = _problem(judged, len(answers), getattr(method, "own_advantages", False))
        if problem is not None:
            raise InputError(f"method: {name}: {problem} (answers of the made-up rollouts: {answers})")


def _problem(judged: Any, size: int, own_advantages: bool) -> str | None:
    if not isinstance(judged, GroupReward):
        return f"`score` must return a GroupReward, found {type(judged).__name__}"
    label: Any = judged.label
    if label is not None and not isinstance(label, str):
        return f"the label must be a text or None, found {label!r}"
    shape = (size,)
    if judged.advantages is not None and not own_advantages:
        return "`score` returns advantages, but the method does not say `own_advantages = True`"
    for what, values in (("rewards", judged.rewards), ("advantages", judged.advantages)):
        if values is None and what == "advantages":
            continue
        if not isinstance(values, np.ndarray) or values.shape != shape:
            return f"{what} must be an array with one number for each of the {size} rollouts, found {values!r}"
        if not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
            return f"{what} must be finite floating-point numbers, found {values!r}"
    return None


def _group(view: View, role: Role, answers: Sequence[str | None]) -> RolloutGroup:
    tokens = count(3)
    completions = tuple(
        Completion(
            token_ids=np.array([next(tokens) for _ in range(place + 2)], dtype=np.int32),
            logprobs=np.full(place + 2, -0.5, dtype=np.float32),
            text="nothing" if answer is None else f"so it is \\boxed{{{answer}}}",
            answer=answer,
            finish_reason="stop",
            weight_version=0,
        )
        for place, answer in enumerate(answers)
    )
    return RolloutGroup("trial/0", view, role, Prompt("What is 1?", np.array([1, 2], dtype=np.int32)), completions)
