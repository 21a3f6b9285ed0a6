"""How stable pseudo-labels are: the label of a question now against the one it had when it was last labelled.

RUN/labels.jsonl holds one line a step, `{"step": 3, "labels": [[uid, view, label, share, right], ...]}`: the label,
the share of the group's rollouts that give it, and whether it is the data set's answer (null: there is
none). It is a file of its own, not a look back into the dumps of rollouts: those may be turned off and weigh megabytes
a step, a line of labels weighs kilobytes. Read by people (`report.question_states`), and by this module on resuming;
never by training.

Invariants, each held by a test: a step is on disk when `observe` returns; opening for `first_step` forgets that step
and later ones, so a resumed run counts what an uninterrupted one would; a part of a line that a kill left is dropped.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import append_line, replaced_whole, writing
from megatron_coreward.telemetry.rollout_dump import ScoredGroup

FILE_NAME = "labels.jsonl"

Key = tuple[str, str]  # uid, view


class LabelHistory:
    """The last label of every question and view."""

    def __init__(
        self,
        path: Path,
        same: Callable[[str, str], bool],
        first_step: int = 0,
        compare: Callable[[Sequence[Sequence[str]]], None] = lambda groups: None,
    ) -> None:
        """`same` says whether two labels are one answer (`AnswerEquivalence.equivalent`); `first_step` comes next.
        `compare` is given all pairs of labels before `same` is asked for them (`AnswerEquivalence.compare`).

        Raises InputError if a whole line of the file is not a step's labels.
        """
        self._same, self._compare = same, compare
        self._last: dict[Key, str] = {}
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path, first_step)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def observe(self, step: int, scored: Iterable[ScoredGroup]) -> dict[str, float]:
        """Takes over the labels of a step's policy groups and returns how they changed.

        `label/flip_rate`: of the labels whose question had one before, in the same view, the share that is another
        answer; `label/seen_before_share`: the share of labels whose question had one before. A group without a label
        counts in neither and leaves the last one as it was. Without any label there are no metrics.
        """
        labelled: dict[Key, ScoredGroup] = {
            (item.group.uid, item.group.view): item
            for item in scored
            if item.group.role == "policy" and item.label is not None
        }
        labels: dict[Key, str] = {key: item.label for key, item in labelled.items() if item.label is not None}
        if not labels:
            return {}
        self._compare(
            [
                tuple(
                    text
                    for text in (
                        self._last.get(key),
                        label,
                        labelled[key].ground_truth,
                        *dict.fromkeys(labelled[key].group.answers),
                    )
                    if text is not None
                )
                for key, label in labels.items()
            ]
        )
        flips = [not self._same(self._last[key], label) for key, label in labels.items() if key in self._last]
        entries = [[*key, label, *self._details(labelled[key], label)] for key, label in labels.items()]
        line = json.dumps({"step": step, "labels": entries})
        with writing(self._path):
            append_line(self._descriptor, line.encode() + b"\n", self._path)
        for key, label in labels.items():
            self._last[key] = label
        metrics = {"label/seen_before_share": len(flips) / len(labels)}
        return metrics | ({"label/flip_rate": sum(flips) / len(flips)} if flips else {})

    def _details(self, item: ScoredGroup, label: str) -> tuple[float, bool | None]:
        answers = item.group.answers
        giving = sum(answer is not None and self._same(label, answer) for answer in answers)
        share = round(giving / len(answers), 4)
        return share, None if item.ground_truth is None else self._same(label, item.ground_truth)

    def snapshot(self, step: int) -> bytes:
        """The last label of every question as a history of one line: all that a run needs to go on after `step`."""
        labels = [[*key, label] for key, label in self._last.items()]
        return json.dumps({"step": step, "labels": labels}).encode() + b"\n"

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "LabelHistory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, path: Path, first_step: int) -> None:
        lines, part = read_lines(path)
        kept = [(line, labels) for step, line, labels in lines if step < first_step]
        for _, labels in kept:
            self._last.update(labels)
        if part or len(kept) != len(lines):
            with replaced_whole(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line, _ in kept))


def read_lines(path: Path) -> tuple[list[tuple[int, bytes, dict[Key, str]]], bytes]:
    """Step, line and labels of every whole line, and the part of a line at the end that a kill may have left.

    Raises InputError if a whole line is not a step's labels.
    """
    *whole, part = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            lines.append((int(row["step"]), line, {(uid, view): label for uid, view, label, *_ in row["labels"]}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: not the labels of a step ({error}); remove the file: checkpoints have copies"
            ) from error
    return lines, part
