"""The names of keys: which were renamed, and which one somebody may have meant."""

import difflib
from collections.abc import Iterable

# Old name -> new one. The old one is refused with the new one, for one release.
RENAMED_KEYS = {
    "rollout.lag": "rollout.max_staleness",
    "teacher.lag": "teacher.lookahead",
    "rewards.answer_forms": "rewards.answer_formats",
    "rewards.judge_timeout_s": "rewards.comparison_timeout_s",
    "faults.bad_gradient": "faults.nonfinite_gradients",
    "guard.min_signs": "guard.min_indicators",
    "sync.hashes": "sync.checksums",
}


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The one of the known words that is nearest, if one is near; capitals do not matter."""
    by_small = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_small, n=1)
    return by_small[close[0]] if close else None
