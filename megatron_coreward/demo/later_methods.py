"""The study of the methods of later papers, beside majority voting: the demo's former 75 steps from one start.

megatron-coreward demo --study methods
"""

from collections.abc import Sequence

from megatron_coreward.config.methods import BUILT_IN, MethodName
from megatron_coreward.demo.run import COMPARED
from megatron_coreward.demo.study import Cell

STUDY = "methods"
STEPS = 75
_CONTROLS: tuple[MethodName, ...] = ("majority_voting", "random_reward")
METHODS: tuple[MethodName, ...] = (
    *_CONTROLS,
    *(name for name in BUILT_IN if name not in (*_CONTROLS, *COMPARED, "co_rewarding_i+ii_original")),
)
SEEDS = (1,)
SETTINGS = (f"steps={STEPS}", "validation.every=15", "actor.lr=1e-4")


def cells(seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells in the order of running."""
    return [Cell(method, seed, method, SETTINGS) for seed in seeds or SEEDS for method in METHODS]
