"""The study of bad rephrasings: what Co-rewarding-I learns if a share of its second view is wrong.

megatron-coreward demo --study rephrasing --seeds 1 2
"""

from collections.abc import Sequence
from functools import partial

from megatron_coreward.demo.damage import damage, passing
from megatron_coreward.demo.study import Cell
from megatron_coreward.demo.task import Question

STUDY = "rephrasing"
STEPS = 75
SHARES = (0.0, 0.5, 0.25, 0.1)  # the far ends come first
SEEDS = (1, 2)
SETTINGS = (f"steps={STEPS}", "validation.every=25", "actor.lr=1e-4")


def name_of(share: float, filtered: bool) -> str:
    """The name of a cell."""
    return f"damage-{share:g}{'-filtered' if filtered else ''}"


def cells(shares: Sequence[float] = (), seeds: Sequence[int] = ()) -> list[Cell]:
    """The cells in the order of running. Without damage the filter refuses nothing, so that cell stands for both."""
    return [
        Cell(name_of(share, filtered), seed, "co_rewarding_i", SETTINGS, partial(prepare, share, filtered, seed))
        for seed in seeds or SEEDS
        for share in shares or SHARES
        for filtered in ((False, True) if share else (False,))
    ]


def prepare(share: float, filtered: bool, seed: int, questions: list[Question]) -> list[Question]:
    """The questions with their damaged rephrasings; filtered: without those that do not pass."""
    damaged = damage(questions, share, seed)
    return passing(damaged) if filtered else damaged
