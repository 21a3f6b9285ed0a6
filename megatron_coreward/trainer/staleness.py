"""How old weights may be that draw a token, and how old they were. Ages are in steps: updates by a whole batch. Pure.

Step s learns with the weights of s - 1 updates. A token that the weights of v updates drew for it has the age
s - 1 - v. A group may begin, under the weights of c updates, for the steps up to c + 1 + max_staleness. However long it
takes, and whatever weights draw the rest of it, none of its tokens is then older than max_staleness.
"""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.types import RolloutGroup, WeightVersion


def last_to_draw(step: int, max_staleness: int, last: int) -> int:
    """The last step whose groups may begin under the weights with which `step` learns.

    Args:
        last: of the run, or before a border that nothing crosses.
    """
    return min(step + max_staleness, last)


def versions_allowed(num_updates: int, updates_per_batch: int, max_staleness: int) -> Collection[int]:
    """The versions of the policy from which a step may learn that begins after `num_updates` optimizer steps."""
    oldest = max(num_updates - max_staleness * updates_per_batch, 0)
    updates = range(num_updates, oldest - 1, -updates_per_batch)
    return {WeightVersion("policy", update).number for update in updates}


def token_ages(groups: Sequence[RolloutGroup], num_updates: int, updates_per_batch: int) -> NDArray[np.float64]:
    """[T] ages of all response tokens of a step that begins after `num_updates` optimizer steps."""
    versions = np.concatenate([c.token_versions for group in groups for c in group.completions])
    now = WeightVersion("policy", num_updates).number
    ages: NDArray[np.float64] = (now - versions) / WeightVersion("policy", updates_per_batch).number
    return ages


def staleness_metrics(groups: Sequence[RolloutGroup], num_updates: int, updates_per_batch: int) -> dict[str, float]:
    """How old the tokens are that a step learns from."""
    ages = token_ages(groups, num_updates, updates_per_batch)
    continued = [bool(c.later_versions) for group in groups for c in group.completions]
    return {
        "rollout/staleness": float(ages.mean()),
        "rollout/staleness_max": float(ages.max()),
        "rollout/continued_share": float(np.mean(continued)),
    }
