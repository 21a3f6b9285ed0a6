"""Every method by its name in the configuration."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_coreward.rewards.methods.base import Method
from megatron_coreward.rewards.methods.co_rewarding_i import CoRewardingI
from megatron_coreward.rewards.methods.co_rewarding_i_and_ii import CoRewardingIAndII
from megatron_coreward.rewards.methods.co_rewarding_i_and_ii_original import CoRewardingIAndIIOriginal
from megatron_coreward.rewards.methods.co_rewarding_ii import CoRewardingII
from megatron_coreward.rewards.methods.entropy import Entropy
from megatron_coreward.rewards.methods.ground_truth import GroundTruth
from megatron_coreward.rewards.methods.majority_voting import MajorityVoting
from megatron_coreward.rewards.methods.self_certainty import SelfCertainty

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "co_rewarding_i": CoRewardingI(),
        "co_rewarding_ii": CoRewardingII(),
        "co_rewarding_i+ii": CoRewardingIAndII(),
        "co_rewarding_i+ii_original": CoRewardingIAndIIOriginal(),
        "majority_voting": MajorityVoting(),
        "ground_truth": GroundTruth(),
        "self_certainty": SelfCertainty(),
        "entropy": Entropy(),
    }
)
