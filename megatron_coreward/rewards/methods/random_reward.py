"""Random reward, the control of every study: a coin for each rollout, whatever it says.

Models that have seen a benchmark improve on it even so (arXiv 2507.10532), because the clipped loss sharpens what is
there: a method that gains no more than this has learned nothing from its labels.

The coin is a function of the question, the rollout's place and tokens, and the weights that drew it, so that a resumed
or replayed run tosses it the same way, and the same response at another step does not.
"""

import hashlib

import numpy as np

from megatron_coreward.rewards.methods.base import GroupReward, Needs, RewardContext
from megatron_coreward.types import RolloutGroup


class RandomReward:
    name = "random_reward"
    needs = Needs()

    def score(self, group: RolloutGroup, context: RewardContext) -> GroupReward:
        coins = []
        for place, completion in enumerate(group.completions):
            digest = hashlib.blake2b(f"{group.uid}/{group.view}/{place}/{completion.weight_version}/".encode())
            digest.update(np.asarray(completion.token_ids, dtype="<i4").tobytes())
            coins.append(digest.digest()[0] & 1)
        return GroupReward(None, np.array(coins, dtype=np.float32))
