"""Every method by its name in the configuration, and the method of a run."""

from collections.abc import Mapping
from types import MappingProxyType

from megatron_coreward.config import plugins
from megatron_coreward.config.methods import method_title, needs_of, parts_of
from megatron_coreward.rewards.methods.base import Method
from megatron_coreward.rewards.methods.co_rewarding_i import CoRewardingI
from megatron_coreward.rewards.methods.co_rewarding_i_and_ii import CoRewardingIAndII
from megatron_coreward.rewards.methods.co_rewarding_i_and_ii_original import CoRewardingIAndIIOriginal
from megatron_coreward.rewards.methods.co_rewarding_ii import CoRewardingII
from megatron_coreward.rewards.methods.confidence_voting import ConfidenceVoting
from megatron_coreward.rewards.methods.empo import Empo
from megatron_coreward.rewards.methods.entropy import Entropy
from megatron_coreward.rewards.methods.evol_rl import EvolRl
from megatron_coreward.rewards.methods.ground_truth import GroundTruth
from megatron_coreward.rewards.methods.majority_voting import MajorityVoting
from megatron_coreward.rewards.methods.mixture import Mixture, Part
from megatron_coreward.rewards.methods.random_reward import RandomReward
from megatron_coreward.rewards.methods.restrain import Restrain
from megatron_coreward.rewards.methods.scrl import Scrl
from megatron_coreward.rewards.methods.self_certainty import SelfCertainty
from megatron_coreward.rewards.methods.self_harmony import SelfHarmony

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
        "self_harmony": SelfHarmony(),
        "restrain": Restrain(),
        "scrl": Scrl(),
        "empo": Empo(),
        "evol_rl": EvolRl(),
        "confidence_voting": ConfidenceVoting(),
        "random_reward": RandomReward(),
    }
)


def method_of(setting: str | Mapping[str, float]) -> Method:
    """The method of a run: one of the table, a plugin, or several with weights.

    Raises:
        InputError: a plugin cannot be loaded, or the parts cannot be mixed.
    """
    needs_of(setting)  # refuses what cannot stand alone
    named = [(METHODS[name] if name in METHODS else plugins.load(name), weight) for name, weight in parts_of(setting)]
    if isinstance(setting, str):
        method: Method = named[0][0]
        return method
    return Mixture(method_title(setting), [Part(method, weight) for method, weight in named])
