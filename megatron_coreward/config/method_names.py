"""The names of the built-in methods, which a help text needs without anything else."""

from typing import Literal, get_args

MethodName = Literal[
    "co_rewarding_i",
    "co_rewarding_ii",
    "co_rewarding_i+ii",
    "co_rewarding_i+ii_original",
    "majority_voting",
    "ground_truth",
    "self_certainty",
    "entropy",
    "self_harmony",
    "restrain",
    "scrl",
    "empo",
    "evol_rl",
    "confidence_voting",
    "random_reward",
]
BUILT_IN: tuple[MethodName, ...] = get_args(MethodName)
