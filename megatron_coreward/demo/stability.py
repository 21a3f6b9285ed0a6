"""The study of stability: which methods rise, and which of them stay, at learning rates that are given to all alike.

megatron-coreward demo --study stability --methods majority_voting co_rewarding_i --rates 1e-4 --seeds 1 2
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_coreward.config.methods import MethodName
from megatron_coreward.demo.study import Cell
from megatron_coreward.errors import InputError

STUDY = "stability"
STEPS = 225  # five times the demo's
SETTINGS = (f"steps={STEPS}", "validation.every=15", "guard.anchors=64", "guard.anchor_every=8")


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: a method, and settings that make it another one."""

    method: MethodName
    overrides: tuple[str, ...] = ()


ARMS: Mapping[str, Arm] = {
    "ground_truth": Arm("ground_truth"),
    "majority_voting": Arm("majority_voting"),
    "co_rewarding_i": Arm("co_rewarding_i"),
    "co_rewarding_ii": Arm("co_rewarding_ii"),
    "entropy": Arm("entropy"),
    "self_certainty": Arm("self_certainty"),
    "co_rewarding_ii_without_ema": Arm("co_rewarding_ii", ("teacher.decay_start=0", "teacher.decay_end=0")),
}
RATES = (1e-4, 2e-4, 5e-5)  # the demo's own, twice that, and half of it
SEEDS = (1, 2, 3)


def name_of(arm: str, rate: float) -> str:
    """The name of a cell."""
    return f"{arm}/lr-{rate:g}"


def cells(arms: Sequence[str] = (), rates: Sequence[float] = (), seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells in the order of running: all arms at one seed and rate before the next. What is not given is all of it.

    Raises InputError for an unknown arm.
    """
    for arm in arms:
        if arm not in ARMS:
            raise InputError(f"--methods: found {arm!r}; allowed: {', '.join(ARMS)}")
    return [
        Cell(name_of(arm, rate), seed, ARMS[arm].method, (*SETTINGS, f"actor.lr={rate:g}", *ARMS[arm].overrides))
        for seed in seeds or SEEDS
        for rate in rates or RATES
        for arm in arms or ARMS
    ]
