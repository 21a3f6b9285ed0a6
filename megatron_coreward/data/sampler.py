"""The order in which a run meets its problems: a pure function of seed, step and number of problems.

Invariants:
1. Resuming needs nothing but the number of the step: batch k is the same whether or not the batches before were drawn.
2. Batches follow each other through the epochs without a gap: every run of `num_problems` draws that starts at an
   epoch's first position is a permutation of all problems. Nothing is dropped; a batch may straddle two epochs.
3. No batch holds a problem twice (a vote and an advantage belong to one group of one problem).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_coreward.errors import InputError
from megatron_coreward.types import Problem


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which problems, by position, make up the batch of a step.

    Raises InputError if there are fewer problems than a batch holds: invariant 3 could not be kept.
    """

    num_problems: int
    batch_size: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_problems < self.batch_size:
            raise InputError(
                f"data.batch_size: found {self.batch_size}, but only {self.num_problems} problems to draw from; "
                f"allowed: at most {self.num_problems}, so that no batch holds a problem twice"
            )

    def batch(self, step: int) -> list[int]:
        """[batch_size] positions; `step` counts from 0, the number of batches before this one."""
        epoch, start = divmod(step * self.batch_size, self.num_problems)
        positions: list[int] = self.epoch(epoch)[start : start + self.batch_size].tolist()
        if len(positions) < self.batch_size:
            positions += self.epoch(epoch + 1)[: self.batch_size - len(positions)].tolist()
        return positions

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """[num_problems] the order of an epoch.

        The permutation of (seed, epoch), but what the straddling batch already holds from the epoch before moves back
        behind that batch. So an epoch's order depends on the one before as far back as the last epoch that began with a
        batch of its own, at most `batch_size` epochs; the walk starts there.
        """
        return _order_of(self, epoch)

    def _walk(self, epoch: int) -> NDArray[np.int64]:
        first = epoch
        while self._carried(first):
            first -= 1
        order = self._permutation(first)
        for number in range(first + 1, epoch + 1):
            carried = self._carried(number)
            order = _move_back(self._permutation(number), order[-carried:], self.batch_size - carried)
        return order

    def _carried(self, epoch: int) -> int:
        """How many problems of the epoch before are in the batch that this epoch begins with."""
        return epoch * self.num_problems % self.batch_size if self.shuffle else 0

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_problems)
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_problems)


@lru_cache(maxsize=4)  # a step asks several times for its batch, and the walk may go back hundreds of epochs
def _order_of(order: BatchOrder, epoch: int) -> NDArray[np.int64]:
    found = order._walk(epoch)
    found.setflags(write=False)
    return found


def _move_back(order: NDArray[np.int64], held: NDArray[np.int64], head: int) -> NDArray[np.int64]:
    """`order` with its first `head` places given to the first entries that are not in `held`; the rest keep order."""
    to_front = np.flatnonzero(~np.isin(order, held))[:head]
    return np.concatenate([order[to_front], np.delete(order, to_front)])


class BatchSampler:
    """The batches of a run, by step."""

    def __init__(self, problems: Sequence[Problem], batch_size: int, seed: int, shuffle: bool = True) -> None:
        self.order = BatchOrder(len(problems), batch_size, seed, shuffle)
        self._problems = problems

    def batch(self, step: int) -> list[Problem]:
        """The problems of a step; `step` counts from 0, so a run that has made k updates goes on with `batch(k)`."""
        return [self._problems[position] for position in self.order.batch(step)]
