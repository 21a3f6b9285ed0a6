"""The order of questions if a step may draw more of them than a batch has (`rollout.resample_flat`).

How many a step draws depends on rewards, so the order is no function of the step. It is one of seed and of what was
drawn, which a small state holds: it goes into checkpoints and beside the rollouts of a step.

Invariants (tests/data/test_question_stream.py):
  1. Every problem is drawn exactly once in an epoch, however many each step draws.
  2. No step draws a problem twice, also not across the border of an epoch: one that it holds is put off to the next.
  3. A stream that is begun from a state goes on as the one that the state is from.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.errors import InputError


@dataclass(frozen=True, slots=True)
class StreamState:
    """What was drawn: the first `position` problems of the epochs one after the other, except those put off."""

    position: int = 0
    put_off: tuple[int, ...] = ()  # problems to be drawn before any further one, oldest first

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"position": self.position, "put_off": list(self.put_off)}

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> "StreamState":
        """What `to_json` gave."""
        return cls(int(found["position"]), tuple(int(place) for place in found["put_off"]))


@dataclass(frozen=True, slots=True)
class QuestionStream:
    """Problems, by their place in the data, in the order in which they are drawn.

    Raises InputError if a step could ask for more problems than there are: invariant 2 could not be kept.
    """

    num_problems: int
    most_in_a_step: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_problems < self.most_in_a_step:
            raise InputError(
                f"rollout.resample_flat: a step may draw {self.most_in_a_step} questions, found {self.num_problems}; "
                "allowed: as many as data.batch_size * (1 + rollout.resample_flat), so that no step holds one twice"
            )

    def draw(self, state: StreamState, count: int, held: Collection[int]) -> tuple[list[int], StreamState]:
        """The next `count` problems that are not in `held` (those that the step has already), and the state after."""
        drawn: list[int] = []
        put_off = list(state.put_off)
        for place in state.put_off:
            if len(drawn) < count and place not in held and place not in drawn:
                drawn.append(place)
                put_off.remove(place)
        position = state.position
        while len(drawn) < count:
            place = self._at(position)
            position += 1
            if place in held or place in drawn:
                put_off.append(place)
            else:
                drawn.append(place)
        return drawn, replace(state, position=position, put_off=tuple(put_off))

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_problems)
        return int(_permutation(self.num_problems, self.seed, epoch)[place]) if self.shuffle else place


@lru_cache(maxsize=4)
def _permutation(num_problems: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_problems)
