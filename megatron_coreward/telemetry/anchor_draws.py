"""RUN/anchors.jsonl: what the policy answered to the anchor questions (`trainer.anchors`), a line for each draw.

`{"step": 20, "answers": {uid: [answer, ...], ...}}`; the first line, of step 0, also holds the majorities by which the
anchors were chosen, `"labels": {uid: majority, ...}`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_coreward.errors import InputError

FILE_NAME = "anchors.jsonl"


@dataclass(frozen=True, slots=True)
class AnchorDraw:
    """One line."""

    step: int
    answers: dict[str, list[str | None]]  # by uid
    labels: dict[str, str] | None  # the first majorities; None: not of the first line
    line: bytes


def read_draws(path: Path) -> tuple[list[AnchorDraw], bytes]:
    """Every whole line, and the part of a line at the end that a kill may have left.

    Raises InputError if a whole line is not a draw.
    """
    *whole, part = path.read_bytes().split(b"\n")
    draws = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            labels = row.get("labels")
            draws.append(
                AnchorDraw(int(row["step"]), dict(row["answers"]), None if labels is None else dict(labels), line)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: not a draw of anchor questions ({error}); remove the file: the run then goes "
                "on without anchors"
            ) from error
    return draws, part
