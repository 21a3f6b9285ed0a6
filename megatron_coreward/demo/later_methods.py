"""The study of the methods of later papers, beside majority voting: the demo's former 75 steps from one start.

megatron-coreward demo --study methods
"""

from collections.abc import Sequence

from megatron_coreward.config.methods import MethodName
from megatron_coreward.demo.study import Cell

STUDY = "methods"
STEPS = 75
METHODS: tuple[MethodName, ...] = (
    "majority_voting",
    "random_reward",
    "self_harmony",
    "restrain",
    "scrl",
    "empo",
    "evol_rl",
    "confidence_voting",
)
SEEDS = (1,)
SETTINGS = (f"steps={STEPS}", "validation.every=15", "actor.lr=1e-4")


def cells(seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells in the order of running."""
    return [Cell(method, seed, method, SETTINGS) for seed in seeds or SEEDS for method in METHODS]
