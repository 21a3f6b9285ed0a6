"""The checkpoints of the Co-rewarding paper (arXiv 2508.00410) as its release lists them, and how long each run is.

One table for the recipes in `configs/paper/`, which `tools/write_paper_recipes.py` makes from it, and for whoever
compares results with the paper's.

Lengths. Table 5 of the paper gives ranges and names neither data sets nor methods: 170 to 220 steps for Co-rewarding-I,
300 to 330 for Co-rewarding-II. A run is as long as the upper end, so that each step that the paper can mean is among
its checkpoints, which are saved every 10 steps; the learning rate and the teacher's decay go by that length. The
release's scripts say 3 epochs, an epoch being the full batches of 128 (58 of MATH, 110 of DAPO-14k, 54 of Open-RS):
174, 330 and 162 steps. Of these only 174 (for I on MATH) and 330 (for II on DAPO-14k) are in the paper's ranges, and
after 174 steps the teacher of Co-rewarding-II would still be initial weights to 41%, after 330 to 19%. The baselines
are trained "under the same setup"; they have no teacher, so theirs is the setup of Co-rewarding-I.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_coreward.config.methods import MethodName

DataName = Literal["math", "dapo", "open_rs"]

_LARGE = ("Qwen3-4B-Base", "Qwen3-8B-Base")
_WITH_LLAMA = (*_LARGE, "Llama-3.2-3B-Instruct")

# Models that were trained on each data set.
MODELS: Mapping[DataName, tuple[str, ...]] = {
    "math": ("Qwen2.5-3B", "Qwen2.5-7B", "Qwen3-1.7B-Base", *_WITH_LLAMA),
    "dapo": _WITH_LLAMA,
    "open_rs": _LARGE,
}

# How the released checkpoints call data sets and methods.
RELEASED_DATA: Mapping[DataName, str] = {"math": "MATH", "dapo": "DAPO14k", "open_rs": "OpenRS"}
RELEASED_METHODS: Mapping[MethodName, str] = {
    "co_rewarding_i": "Co-rewarding-I",
    "co_rewarding_ii": "Co-rewarding-II",
    "ground_truth": "GT",
    "self_certainty": "Self-Certainty",
    "entropy": "Entropy",
    "majority_voting": "Majority-Voting",
}
HUB = "TMLR-Group-HF"

_I, _II = 220, 330
STEPS: Mapping[tuple[DataName, MethodName], int] = {
    (data, method): _II if method == "co_rewarding_ii" else _I for data in MODELS for method in RELEASED_METHODS
}
CHECKPOINT_EVERY = 10
# The first and the last step of Table 5, both ends included.
PAPER_STEPS: Mapping[MethodName, tuple[int, int]] = {
    method: (300, 330) if method == "co_rewarding_ii" else (170, 220) for method in RELEASED_METHODS
}


@dataclass(frozen=True, slots=True)
class PaperRun:
    """One checkpoint of the release."""

    model: str  # of the base model, without its owner
    data: DataName
    method: MethodName

    @property
    def recipe(self) -> str:
        """File name of its recipe, without the ending."""
        return f"{part_name(self.model)}_{self.data}_{self.method}"

    @property
    def released(self) -> str:
        """Its name on the Hugging Face hub."""
        return f"{HUB}/{RELEASED_METHODS[self.method]}-{self.model}-{RELEASED_DATA[self.data]}"

    @property
    def steps(self) -> int:
        return STEPS[self.data, self.method]


def part_name(model: str) -> str:
    """How file names call a model: qwen2_5_3b."""
    return model.lower().replace("-", "_").replace(".", "_")


def paper_runs() -> Iterator[PaperRun]:
    """All 66, data set after data set and method after method."""
    for data, models in MODELS.items():
        for method in RELEASED_METHODS:
            for model in models:
                yield PaperRun(model, data, method)
