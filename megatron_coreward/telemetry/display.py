"""Which metrics a person sees first, and how numbers read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_coreward.telemetry import keys

Kind = Literal["share", "count", "number", "small"]

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Shown:
    """A metric in the short list: its label, and how its value reads."""

    key: str
    label: str
    kind: Kind


HEADLINE = (
    Shown("reward/mean", "reward", "number"),
    Shown("label/accuracy", "label accuracy", "share"),
    Shown("vote/share", "vote share", "share"),
    Shown("advantage/zero_variance_share", "flat groups", "share"),
    Shown("rollout/response_tokens_mean", "tokens", "count"),
    Shown("rollout/truncated_share", "truncated", "share"),
    Shown("rollout/entropy", "entropy", "number"),
    Shown("loss/kl", "KL", "small"),
    Shown("optim/grad_norm", "grad norm", "number"),
    Shown("sync/logprob_gap", "logprob gap", "small"),
)


def format_value(value: float, kind: Kind) -> str:
    """`share` as a percentage, `count` as a whole number, `number` with three decimals, `small` with an exponent."""
    if not math.isfinite(value):
        return str(value)
    match kind:
        case "share":
            return f"{100 * value:.1f}%"
        case "count":
            return f"{value:,.0f}"
        case "number":
            return f"{value:.3f}"
        case "small":
            return f"{value:.1e}"


def format_seconds(seconds: float) -> str:
    """`4.2 s`, `6m 02s`, `1h 03m`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def sparkline(values: Sequence[float]) -> str:
    """A bar a value, from the least to the greatest finite one; a blank for one that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite) / 2, max(finite) / 2 - min(finite) / 2  # halves, since the whole may overflow

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return _BARS[round((value / 2 - low) / span * (len(_BARS) - 1))] if span > 0 else _BARS[len(_BARS) // 2 - 1]

    return "".join(map(bar, values))


def phase_seconds(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """The top-level phases of a step that took time, in their order, and what lay outside; names without `time/`."""
    timed = [(phase, metrics.get(f"time/{phase}_s", 0.0)) for phase in (*keys.PHASES, keys.OUTSIDE)]
    return [(phase, seconds) for phase, seconds in timed if seconds > 0]
