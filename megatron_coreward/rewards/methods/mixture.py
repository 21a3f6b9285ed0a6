"""Several methods at once: their rewards, times their weights, added rollout by rollout.

The label of a group is that of the first part, in the order in which the parts are written, that has one. A part judges
the groups of the views that its needs name; one that names none judges every group. Each part sees what its own needs
name and no more, whatever the others may read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_coreward.config.needs import together
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.methods.base import GroupReward, Method, Needs, RewardContext
from megatron_coreward.rewards.methods.permission import NarrowedContext
from megatron_coreward.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Part:
    """A method of a mixture, and what its rewards are multiplied by."""

    method: Method
    weight: float


class Mixture:
    """The weighted sum of its parts."""

    def __init__(self, name: str, parts: Sequence[Part]) -> None:
        """Raises InputError for a part that gives advantages and not rewards alone: those cannot be added."""
        for part in parts:
            if getattr(part.method, "own_advantages", False):
                raise InputError(f"method: {part.method.name} gives advantages of its own, so it cannot be mixed")
        self.name = name
        self.needs: Needs = together(part.method.needs for part in parts)
        self._parts = tuple(parts)

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        total, label = np.zeros(len(group.completions), dtype=np.float32), None
        for part in self._parts:
            views = part.method.needs.views
            if views and group.view not in views:
                continue
            judged = part.method.score(group, NarrowedContext(part.method.needs, context))
            if judged.advantages is not None:
                raise InputError(
                    f"method: {part.method.name} gives advantages for question {group.uid} without saying so "
                    "(`own_advantages = True`), and advantages cannot be mixed"
                )
            total += np.float32(part.weight) * judged.rewards
            label = judged.label if label is None else label
        return GroupReward(label, total)
