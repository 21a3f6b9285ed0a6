"""What became of each question's label in the course of a run, from `labels.jsonl`.

Majority labels may improve without anything being learned, and a wrong one may stay for good (arXiv 2605.19444). So
each question is looked at by itself: its label at first, its label now, and whether the rollouts agree on it more than
they did.

| state | the label was | the label is |
|---|---|---|
| `learned` | wrong | right |
| `sharpened` | right | right, with at least as large a share of the rollouts |
| `weakened` | right | right, with a smaller share |
| `corrupted` | right | wrong |
| `locked` | wrong | wrong, and the same wrong answer as the time before, given by at least half of the rollouts |
| `unsettled` | wrong | wrong in any other way |

Without ground truths there is no right and wrong, and no state.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_coreward.errors import InputError

State = Literal["learned", "sharpened", "weakened", "unsettled", "locked", "corrupted"]
STATES: tuple[State, ...] = get_args(State)

LOCKED_SHARE = 0.5  # of the rollouts, that give a wrong label twice

Key = tuple[str, str]  # uid, view


@dataclass(frozen=True, slots=True)
class Visit:
    """A question at a step, in one view."""

    step: int
    label: str
    share: float  # of the rollouts, that give the label
    right: bool


def read_visits(path: Path) -> dict[Key, list[Visit]]:
    """The visits of every question and view whose label can be judged, in order. Lines of earlier versions have none.

    Raises InputError if a whole line is not the labels of a step.
    """
    visits: dict[Key, list[Visit]] = {}
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            for uid, view, label, *details in row["labels"]:
                if len(details) == 2 and None not in details:
                    visit = Visit(int(row["step"]), label, float(details[0]), bool(details[1]))
                    visits.setdefault((uid, view), []).append(visit)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not the labels of a step ({error})") from error
    return visits


def state_of(visits: Sequence[Visit]) -> State:
    """The state of a question that has been visited twice or more."""
    first, before, now = visits[0], visits[-2], visits[-1]
    if now.right:
        if not first.right:
            return "learned"
        return "sharpened" if now.share >= first.share else "weakened"
    if first.right:
        return "corrupted"
    return "locked" if now.label == before.label and now.share >= LOCKED_SHARE else "unsettled"


def states_over_steps(visits: Mapping[Key, Sequence[Visit]]) -> Iterator[tuple[int, dict[State, int]]]:
    """Questions in each state after each step from which on there are any, by the visits up to then."""
    events = sorted((visit.step, key, place) for key, seen in visits.items() for place, visit in enumerate(seen))
    state: dict[Key, State] = {}
    for position, (step, key, place) in enumerate(events):
        if place > 0:
            state[key] = state_of(visits[key][: place + 1])
        last_of_step = position + 1 == len(events) or events[position + 1][0] != step
        if state and last_of_step:
            count = Counter(state.values())
            yield step, {name: count[name] for name in STATES}
