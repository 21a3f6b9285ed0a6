"""The published file format: parquet rows with `prompt`, `reward_model`, `data_source`, `ability` and `extra_info`.

| column | type | read as |
|---|---|---|
| `prompt` | list of {role, content} | `Row.messages`; ends with a user message |
| `data_source` | string | `Row.source` |
| `extra_info` | struct with `index`: integer or string | `Row.index`, unique within a source |
| `reward_model` | struct with `ground_truth`: string or integer; may be absent or null | `Row.ground_truth` |

Further columns and fields (`ability`, `extra_info.split`, `level`, ...) are not read.

Sets that are published as pairs (`train_pairs`, the Rephrased sets on the hub) hold both views of a question in a row:

| column | type | read as |
|---|---|---|
| `original_message`, `rephrased_message` | list of {role, content} | `Row.messages` of the one view or the other |
| `idx` | integer or string | `Row.index`; counted in the pairs, so not always the index that the unpaired files have |
| `solution` | string or integer; may be absent or null | `Row.ground_truth` |

They do not name their source, which is `PAIRS_SOURCE` for all of them. A file is checked as a whole when
it is read, so nothing downstream meets a half-valid row. Every error is an InputError that names file, row (counted
from 0), column, what was found and what is allowed.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_coreward.errors import InputError
from megatron_coreward.types import View

PAIRS_SOURCE = "train_pairs"
PAIRS: Mapping[View, str] = {"original": "original_message", "rephrased": "rephrased_message"}
ROLES = ("system", "user", "assistant")
BATCH_ROWS = 4096  # rows in memory while a file is streamed

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.int64()), ("split", pa.string())])),
    ]
)


class Message(TypedDict):
    """One message of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One question of a file, checked."""

    messages: tuple[Message, ...]  # system first if at all, user last
    ground_truth: str | None  # None: absent, null or blank
    source: str
    index: int | str

    @property
    def uid(self) -> str:
        return f"{self.source}/{self.index}"


def read_rows(file: Path, view: View = "original") -> list[Row]:
    """All rows of a parquet file, in file order; `view`: which question of a row to read, if it has both.

    Raises InputError if the file is missing, unreadable or empty, a column is missing or has a wrong type, a
    value is missing, or two rows share source and index.
    """
    return list(iter_rows(file, view))


def iter_rows(file: Path, view: View = "original") -> Iterator[Row]:
    """The rows of `read_rows` one by one: of a file of any size, one batch and the rows' uids are in memory.

    Raises InputError as `read_rows` does; for a bad row, when it is reached.
    """
    for row in iter_rows_or_faults(file, view):
        if isinstance(row, InputError):
            raise row
        yield row


def iter_rows_or_faults(file: Path, view: View = "original") -> Iterator[Row | InputError]:
    """The rows of a file in file order; in the place of a bad row, what is wrong with it.

    Raises InputError for what is wrong with the file as a whole, and if two rows share source and index.
    """
    seen: dict[str, int] = {}
    number = -1
    for number, cells in enumerate(_cells(file, view)):
        try:
            row = _row(file, number, *cells)
        except InputError as fault:
            yield fault
            continue
        first = seen.setdefault(row.uid, number)
        if first != number:
            found = f"{row.index!r}, which row {first} has too"
            raise _bad(file, "extra_info.index", found, f"one row an index within the source {row.source!r}", number)
        yield row
    if number < 0:
        raise InputError(f"{file}: found no rows; allowed: at least one")


def _row(file: Path, number: int, prompt: Any, source: Any, extra_info: Any, reward_model: Any) -> Row:
    """One row, checked. Raises InputError."""
    if not source:
        raise _bad(file, "data_source", repr(source), "a non-empty string", number)
    index = None if extra_info is None else extra_info["index"]
    if index is None or index == "":
        raise _bad(file, "extra_info.index", repr(index), "an integer or a non-empty string", number)
    ground_truth = None if reward_model is None else reward_model.get("ground_truth")
    ground_truth = None if ground_truth is None or not str(ground_truth).strip() else str(ground_truth)
    return Row(_messages(file, number, prompt), ground_truth, source, index)


def write_rows(file: Path, rows: Iterable[Row], *, split: str, ability: str = "math") -> None:
    """Writes rows in the published format; the file appears whole or not at all. Indices must be integers."""
    records = [
        {
            "data_source": row.source,
            "prompt": list(row.messages),
            "ability": ability,
            "reward_model": {"ground_truth": row.ground_truth, "style": "rule"},
            "extra_info": {"index": row.index, "split": split},
        }
        for row in rows
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def holds_pairs(file: Path) -> bool:
    """Whether both views of a question are in one row. False for what is no parquet file: reading it says so."""
    try:
        return set(pq.read_schema(file).names) >= {"idx", *PAIRS.values()}
    except (pa.ArrowException, OSError):
        return False


def _cells(file: Path, view: View) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Prompt, data source, extra info and reward model (None: no such column) of each row; column types are checked."""
    if not file.is_file():
        found = "a directory" if file.is_dir() else "nothing"
        raise InputError(f"{file}: found {found} there; allowed: a parquet file")
    if holds_pairs(file):
        yield from _pair_cells(file, view)
        return
    try:
        with pq.ParquetFile(file) as parquet:
            _check_schema(file, parquet.schema_arrow)
            present = {"prompt", "data_source", "extra_info", "reward_model"} & set(parquet.schema_arrow.names)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=sorted(present)):
                ground_truths = (
                    batch["reward_model"].to_pylist() if "reward_model" in present else [None] * batch.num_rows
                )
                columns = (batch[name].to_pylist() for name in ("prompt", "data_source", "extra_info"))
                yield from zip(*columns, ground_truths, strict=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: found a file that does not read as parquet ({error}); allowed: a parquet file"
        ) from error


def _pair_cells(file: Path, view: View) -> Iterator[tuple[Any, Any, Any, Any]]:
    """The same of a file of pairs, whose columns have other names."""
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        own = {PAIRS[view]: "prompt", "idx": "index"} | ({"solution": "ground_truth"} if "solution" in names else {})
        fields = {own[field.name]: field for field in parquet.schema_arrow if field.name in own}
        _check_messages(file, PAIRS[view], fields["prompt"].type)
        for name, allowed in (("index", "integer or string"), ("ground_truth", "string or integer")):
            kind = fields[name].type if name in fields else pa.null()
            if not (_is_text(kind) or _is_integer(kind) or (name == "ground_truth" and pa.types.is_null(kind))):
                raise _bad(file, fields[name].name, f"type {kind}", allowed)
        for batch in parquet.iter_batches(BATCH_ROWS, columns=list(own)):
            for row in batch.to_pylist():
                answer = {"ground_truth": row.get("solution")}
                yield row[PAIRS[view]], PAIRS_SOURCE, {"index": row["idx"]}, answer


def _check_messages(file: Path, column: str, prompt: pa.DataType) -> None:
    is_list = pa.types.is_list(prompt) or pa.types.is_large_list(prompt)
    message = _fields(prompt.value_type) if is_list else {}
    if not all(_is_text(message.get(name)) for name in ("role", "content")):
        raise _bad(file, column, f"type {prompt}", "a list of structs with the strings role and content")


def _check_schema(file: Path, schema: pa.Schema) -> None:
    types: Mapping[str, pa.DataType] = {field.name: field.type for field in schema}
    for column in ("prompt", "data_source", "extra_info"):
        if column not in types:
            raise InputError(
                f"{file}: found no column {column}, only {', '.join(schema.names)}; "
                "allowed: prompt, data_source, extra_info and, optionally, reward_model"
            )

    _check_messages(file, "prompt", types["prompt"])
    if not _is_text(types["data_source"]):
        raise _bad(file, "data_source", f"type {types['data_source']}", "string")
    index = _fields(types["extra_info"]).get("index")
    if not _is_text(index) and not _is_integer(index):
        raise _bad(file, "extra_info", f"type {types['extra_info']}", "a struct with the integer or string index")
    reward_model = types.get("reward_model", pa.null())
    ground_truth = _fields(reward_model).get("ground_truth", pa.null())
    is_struct = pa.types.is_struct(reward_model) or pa.types.is_null(reward_model)
    if not is_struct or not (pa.types.is_null(ground_truth) or _is_text(ground_truth) or _is_integer(ground_truth)):
        allowed = "a struct with the string or integer ground_truth, or no such column"
        raise _bad(file, "reward_model", f"type {reward_model}", allowed)


def _messages(file: Path, number: int, prompt: list[dict[str, Any] | None] | None) -> tuple[Message, ...]:
    """The conversation of a row: known roles, system only at the start, a user message with text at the end."""
    messages = [message or {} for message in prompt or ()]
    roles = [message.get("role") for message in messages]
    for place, (role, message) in enumerate(zip(roles, messages, strict=True)):
        if role not in ROLES or (role == "system" and place > 0):
            allowed = "system (first message only), user, assistant"
            raise _bad(file, f"prompt[{place}].role", repr(role), allowed, number)
        if message["content"] is None:
            raise _bad(file, f"prompt[{place}].content", "None", "a string", number)
    if not roles or roles[-1] != "user":
        raise _bad(file, "prompt", f"messages of the roles {roles}", "a user message at the end", number)
    if not messages[-1]["content"].strip():
        raise _bad(file, "prompt", "a blank user message", "a user message with text", number)
    return tuple(cast(Message, {"role": m["role"], "content": m["content"]}) for m in messages)


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Name to type of a struct's fields; nothing for another type."""
    return {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_integer(kind: pa.DataType | None) -> bool:
    return kind is not None and bool(pa.types.is_integer(kind))


def _bad(file: Path, column: str, found: str, allowed: str, row: int | None = None) -> InputError:
    where = f"{file}, column {column}" if row is None else f"{file}, row {row}, column {column}"
    return InputError(f"{where}: found {found}; allowed: {allowed}")
