"""The metrics of one step: one flat row of finite scalars, every key written once.

Invariants, each held by a test:
- a key is `area/name` (see `keys`), and writing it a second time is an error that names it;
- a value is one number; arrays are reduced first, by `reduce_values`;
- a value is finite, unless the row is to keep NaN and infinities (then whoever stores the row shows a gap).
"""

import math
import re
from collections.abc import Mapping
from typing import Literal, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_coreward.errors import RunError
from megatron_coreward.telemetry import keys

Reduction = Literal["mean", "std", "min", "max", "sum", "median"]

_KEY = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.@+-]+)+")


class StepMetrics:
    """Collects the metrics of one step.

    `non_finite`: `raise` ends the run at the first NaN or infinity, naming the metric and the step; `keep` records it,
    for a caller that looks at the row and decides for itself.
    """

    def __init__(self, step: int, non_finite: Literal["raise", "keep"] = "raise") -> None:
        self.step = step
        self._non_finite = non_finite
        self._values: dict[str, float] = {}

    def add(self, key: str, value: SupportsFloat) -> None:
        """One number: a Python or numpy scalar, or a tensor of one element. Raises on a bad or repeated key."""
        if key != keys.STEP_TIME and not _KEY.fullmatch(key):
            raise ValueError(f"metric key {key!r}: expected area/name, such as reward/mean, or {keys.STEP_TIME}")
        if key in self._values:
            raise ValueError(f"metric {key} is written twice in step {self.step}")
        number = _number(key, value)
        if self._non_finite == "raise" and not math.isfinite(number):
            raise RunError(f"metric {key} is {number} in step {self.step}")
        self._values[key] = number

    def update(self, values: Mapping[str, SupportsFloat]) -> None:
        """Every entry of a mapping, as `add` takes it."""
        for key, value in values.items():
            self.add(key, value)

    def add_reduced(self, key: str, values: ArrayLike, *how: Reduction) -> None:
        """Per-sequence values, reduced: see `reduce_values`."""
        self.update(reduce_values(key, values, *how))

    def as_dict(self) -> dict[str, float]:
        """The row so far, in the order of writing; `step` is not in it."""
        return dict(self._values)


def reduce_values(key: str, values: ArrayLike, *how: Reduction) -> dict[str, float]:
    """Reduces values (any shape) to one number for each way in `how`; the mean alone if none is given.

    The names are `reward/mean` for an area (`reward`) and `rollout/response_tokens_mean` for a key
    (`rollout/response_tokens`). No values give no metrics: the mean of nothing is not zero. `std` is that of the values
    themselves (ddof=0).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return {}
    joint = "_" if "/" in key else "/"
    return {f"{key}{joint}{way}": _reduce(array, way) for way in how or ("mean",)}


def _number(key: str, value: SupportsFloat) -> float:
    refused = isinstance(value, str) or getattr(value, "ndim", 0) != 0
    try:
        if not refused:
            return float(value)
    except TypeError:
        pass
    raise TypeError(f"metric {key}: expected one number, found {type(value).__name__} {value!r}")


def _reduce(array: NDArray[np.float64], way: Reduction) -> float:
    match way:
        case "mean":
            return float(array.mean())
        case "std":
            return float(array.std())
        case "min":
            return float(array.min())
        case "max":
            return float(array.max())
        case "sum":
            return float(array.sum())
        case "median":
            return float(np.median(array))
