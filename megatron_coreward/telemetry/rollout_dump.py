"""rollouts/step_000001.parquet: every completion of a step and what became of it, one row each.

The file is complete: reading it gives the groups back as they were, so that votes, rewards and labels can be recomputed
without the run. A file appears whole or not at all.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.files import replaced_whole, writing
from megatron_coreward.types import Completion, FloatArray, IntArray, Prompt, RolloutGroup

_LATER = pa.list_(pa.struct([("first_token", pa.int32()), ("weight_version", pa.int64())]))
SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("view", pa.string(), nullable=False),  # original | rephrased
        pa.field("role", pa.string(), nullable=False),  # policy | teacher
        pa.field("group", pa.int32(), nullable=False),  # place of the completion's group in the step
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        # Of token_ids, by the engine and the weights that drew each; empty if nothing reads them.
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("answer", pa.string()),  # null: no final answer was found
        pa.field("ground_truth", pa.string()),  # null: the data set has none
        pa.field("pseudo_label", pa.string()),  # what the group was rewarded against; null: nothing, or no vote
        pa.field("reward", pa.float32()),  # null for the teacher's rollouts
        pa.field("advantage", pa.float32()),  # null for rollouts that only voted: the teacher's, some of rollout.votes
        pa.field("weight_version", pa.int64(), nullable=False),  # of the weights that drew the first token
        # Weights that drew the rest, from a token on; null: none, or a file that is older than this column.
        pa.field("later_versions", _LATER),
        pa.field("finish_reason", pa.string(), nullable=False),  # stop | length
    ]
)

_FORMER = {"gold": "ground_truth"}  # columns that had another name in earlier files
# Of pyarrow: a file that is cut off is "invalid", a damaged page an OSError, a damaged schema a ValueError.
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
_FILE_NAME = re.compile(r"step_(\d{6,})\.parquet")


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group of rollouts with what the step concluded about it. Rewards and advantages are None for the teacher's."""

    group: RolloutGroup
    label: str | None  # the pseudo-label it was rewarded against
    rewards: FloatArray | None  # [G]
    advantages: FloatArray | None  # [G]; NaN for a rollout that voted and is not trained on
    ground_truth: str | None = None  # the data set's answer, for later study

    def __post_init__(self) -> None:
        size = len(self.group.completions)
        if size == 0:
            raise ValueError(f"{self._name}: no completions")
        for name, values in (("rewards", self.rewards), ("advantages", self.advantages)):
            if (values is None) != (self.group.role == "teacher"):
                raise ValueError(f"{self._name}: {name} belong to the policy's groups, and to each of them")
            if values is not None and values.shape != (size,):
                raise ValueError(f"{self._name}: {name} of shape {values.shape} for {size} completions")

    @property
    def _name(self) -> str:
        return f"group {self.group.uid} ({self.group.view}, {self.group.role})"


def rollouts_path(run_dir: Path, step: int) -> Path:
    """The file of a step's rollouts."""
    return run_dir / "rollouts" / f"step_{step:06d}.parquet"


def dumped_steps(run_dir: Path) -> dict[int, Path]:
    """The steps whose rollouts are in a run directory, in order, and their files."""
    found = ((_FILE_NAME.fullmatch(path.name), path) for path in (run_dir / "rollouts").glob("step_*.parquet"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def discard_rollouts(run_dir: Path, first_step: int) -> None:
    """Removes the files of `first_step` and later: what a run that resumes there will sample again."""
    for step, path in dumped_steps(run_dir).items():
        if step >= first_step:
            path.unlink()


def dump_rollouts(
    run_dir: Path, step: int, scored: Sequence[ScoredGroup], notes: Mapping[str, str] | None = None
) -> Path:
    """Writes the completions of a step, group by group in the given order; an older file of that step is replaced.

    `notes` are kept beside them in the file (`read_notes`). Raises RunError if it cannot be written.
    """
    path = rollouts_path(run_dir, step)
    table = _to_table(scored).replace_schema_metadata({**(notes or {}), "step": str(step)})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_whole(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    return path


def read_rollouts(path: Path) -> list[ScoredGroup]:
    """The groups of a step as they were dumped. Raises InputError if the file is missing or of another form."""
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a file of rollouts ({error})") from error
    table = table.rename_columns([_FORMER.get(name, name) for name in table.schema.names])
    place = SCHEMA.get_field_index("later_versions")
    if table.schema.names == [name for name in SCHEMA.names if name != "later_versions"]:
        table = table.add_column(place, SCHEMA.field(place), pa.nulls(len(table), _LATER))
    if not table.schema.equals(SCHEMA):
        raise InputError(f"{path}: columns {table.schema.names}; a file of rollouts has {SCHEMA.names}")
    columns = {name: _column_values(table.column(name)) for name in SCHEMA.names}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [_from_rows(list(members)) for _, members in groupby(rows, key=lambda row: row["group"])]


def read_notes(path: Path) -> dict[str, str]:
    """What `dump_rollouts` was given as notes, and the step. Raises InputError for what is no file of rollouts."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a file of rollouts ({error})") from error
    return {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}


def _to_table(scored: Sequence[ScoredGroup]) -> Any:
    rows = [
        (place, item, completion, sample)
        for place, item in enumerate(scored)
        for sample, completion in enumerate(item.group.completions)
    ]
    columns: dict[str, Any] = {
        "uid": [item.group.uid for _, item, _, _ in rows],
        "view": [item.group.view for _, item, _, _ in rows],
        "role": [item.group.role for _, item, _, _ in rows],
        "group": [place for place, _, _, _ in rows],
        "prompt": [item.group.prompt.text for _, item, _, _ in rows],
        "prompt_token_ids": _ragged([item.group.prompt.token_ids for _, item, _, _ in rows], np.int32),
        "text": [completion.text for _, _, completion, _ in rows],
        "token_ids": _ragged([completion.token_ids for _, _, completion, _ in rows], np.int32),
        "logprobs": _ragged([completion.logprobs for _, _, completion, _ in rows], np.float32),
        "answer": [completion.answer for _, _, completion, _ in rows],
        "ground_truth": [item.ground_truth for _, item, _, _ in rows],
        "pseudo_label": [item.label for _, item, _, _ in rows],
        "reward": [None if item.rewards is None else item.rewards[sample] for _, item, _, sample in rows],
        "advantage": [_number(item.advantages, sample) for _, item, _, sample in rows],
        "weight_version": [completion.weight_version for _, _, completion, _ in rows],
        "later_versions": [
            [{"first_token": first, "weight_version": version} for first, version in completion.later_versions] or None
            for _, _, completion, _ in rows
        ],
        "finish_reason": [completion.finish_reason for _, _, completion, _ in rows],
    }
    return pa.table(columns, schema=SCHEMA)


def _number(values: FloatArray | None, sample: int) -> float | None:
    return None if values is None or np.isnan(values[sample]) else float(values[sample])


def _ragged(arrays: Sequence[IntArray] | Sequence[FloatArray], dtype: type[np.generic]) -> Any:
    """A list column out of 1-D arrays, without a Python object for each number."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    values = np.concatenate([np.asarray(array, dtype=dtype) for array in arrays]) if arrays else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _column_values(column: Any) -> Sequence[Any]:
    """Python values of a column; the entries of a list column as numpy arrays of their own."""
    if not pa.types.is_list(column.type) or column.type == _LATER:
        values: list[Any] = column.to_pylist()
        return values
    chunk = column.combine_chunks()
    offsets = chunk.offsets.to_numpy()
    flat = chunk.values.to_numpy()
    return [flat[begin:end].copy() for begin, end in pairwise(offsets)]


def _from_rows(rows: Sequence[dict[str, Any]]) -> ScoredGroup:
    first = rows[0]
    completions = tuple(
        Completion(
            token_ids=row["token_ids"],
            logprobs=row["logprobs"],
            text=row["text"],
            answer=row["answer"],
            finish_reason=row["finish_reason"],
            weight_version=row["weight_version"],
            later_versions=tuple((one["first_token"], one["weight_version"]) for one in row["later_versions"] or ()),
        )
        for row in rows
    )
    prompt = Prompt(first["prompt"], first["prompt_token_ids"])
    group = RolloutGroup(first["uid"], first["view"], first["role"], prompt, completions)
    scored = group.role == "policy"
    return ScoredGroup(
        group=group,
        label=first["pseudo_label"],
        rewards=np.array([row["reward"] for row in rows], dtype=np.float32) if scored else None,
        advantages=np.array([row["advantage"] for row in rows], dtype=np.float32) if scored else None,
        ground_truth=first["ground_truth"],
    )
