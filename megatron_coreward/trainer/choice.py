"""Which rollouts of a group are trained on if more were drawn for its vote (`rollout.votes`)."""

import hashlib
from dataclasses import replace

import numpy as np

from megatron_coreward.types import FloatArray, IntArray, RolloutGroup


def chosen_rollouts(group: RolloutGroup, n: int, run_seed: int, step: int) -> IntArray:
    """[n] places of the group's rollouts that are trained on, growing; all of them if there are no more than n.

    A function of what is sampled alone, so that a resumed or repeated run trains on the same ones.
    """
    size = len(group.completions)
    if size <= n:
        return np.arange(size, dtype=np.int32)
    name = f"{run_seed}/{step}/{group.uid}/{group.view}/choice".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
    return np.sort(np.random.default_rng(seed).permutation(size)[:n]).astype(np.int32)


def part_of(group: RolloutGroup, rows: IntArray) -> RolloutGroup:
    """The group with the given rollouts alone."""
    if len(rows) == len(group.completions):
        return group
    return replace(group, completions=tuple(group.completions[row] for row in rows))


def spread(values: FloatArray, rows: IntArray, size: int) -> FloatArray:
    """[size] the values at their places, NaN elsewhere."""
    spread_out = np.full(size, np.nan, dtype=np.float32)
    spread_out[rows] = values
    return spread_out
