"""The names of keys: which were renamed, and which one somebody may have meant."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

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


def with_new_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a run was made with, with the new names of renamed keys: runs outlive names."""
    renamed: dict[str, Any] = {}
    for group, keys in tree.items():
        if isinstance(keys, Mapping):
            names = {name: RENAMED_KEYS.get(f"{group}.{name}", f"{group}.{name}") for name in keys}
            renamed[group] = {names[name].removeprefix(f"{group}."): value for name, value in keys.items()}
        else:
            renamed[group] = keys
    return renamed


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The one of the known words that is nearest, if one is near; capitals do not matter."""
    by_small = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_small, n=1)
    return by_small[close[0]] if close else None
