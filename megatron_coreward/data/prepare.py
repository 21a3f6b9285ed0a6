"""`prepare-data`: question sets as they are published, into the parquet format that training reads.

Files are read and written in batches of rows: a set of any size takes the memory of one batch, and of a key and a few
numbers a row. What is written is checked row by row first; a file appears whole or not at all.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_coreward.data.parquet import BATCH_ROWS, SCHEMA, holds_pairs, iter_rows, iter_rows_or_faults
from megatron_coreward.data.sources import AnswerFrom, DataSource
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.telemetry.files import replaced_whole
from megatron_coreward.types import View

PUBLISHED = {"prompt", "reward_model", "data_source", "extra_info"}  # columns of a file that is prepared already

_INTEGER = re.compile(r"[+-]?\d{1,3}(,\d{3})+|[+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d[\d,]*)?\.\d+")
_WHOLE = re.compile(r"[+-]?\d+\.0+")  # 142.0
_FRACTION = re.compile(r"[+-]?(\\[dt]?frac\s*(\{[+-]?\d+\}|\d)\s*(\{\d+\}|\d)|\d+\s*/\s*\d+)")
_WORDS = re.compile(r"(\\text\s*\{[^{}]*\}|[A-Za-z][A-Za-z .,'-]*)")


class Tokenizer(Protocol):
    def __call__(self, text: list[str]) -> Any: ...


@dataclass(slots=True)
class Lengths:
    """Of the questions, in one unit."""

    least: int = 0
    median: int = 0
    p99: int = 0
    most: int = 0


@dataclass(slots=True)
class Summary:
    """What is in a prepared file."""

    rows: int = 0
    without_answer: int = 0
    characters: Lengths = field(default_factory=Lengths)
    tokens: Lengths | None = None
    answer_types: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0  # rows whose question, normalised, an earlier row has
    overlaps: dict[str, int] = field(default_factory=dict)  # other file -> rows whose question it has too
    skipped: list[str] = field(default_factory=list)  # what was wrong with each row that was left out

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def answer_type(answer: str | None) -> str:
    """`integer`, `decimal`, `fraction`, `text`, `expression`, or `none`."""
    text = "" if answer is None else answer.strip().strip("$").removesuffix("%").strip()
    if not text:
        return "none"
    for name, pattern in (("integer", _INTEGER), ("decimal", _DECIMAL), ("fraction", _FRACTION), ("text", _WORDS)):
        if pattern.fullmatch(text):
            return "text" if name == "text" and len(text) > 1 else "expression" if name == "text" else name
    return "expression"


def normalised(question: str) -> str:
    """What makes two questions the same: letters, digits and signs, without case, spacing and layout."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", question)).casefold()


def prepare(
    source: DataSource,
    inputs: Sequence[Path],
    target: Path,
    *,
    split: str,
    system_prompt: str | None,
    against: Sequence[Path] = (),
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    view: View = "original",
    rename: bool = False,
) -> Summary:
    """Writes `target` in the published schema and says what is in it.

    Args:
        inputs: parquet, jsonl or json files, in order. Files that have the published columns keep their prompts,
            answers, indices and, if they name them, sources, abilities and splits.
        system_prompt: put before each question; None: no system message.
        against: prepared files; questions that they share with this one are counted (train/test overlap).
        limit: how many rows to take, the first ones; None: all.
        skip_bad: leave out rows without a question or an answer, and say which; those that stay keep their indices.
        view: which question of a row to take from a file of pairs.
        rename: call the rows of published files `source.data_source` too.

    Raises:
        InputError: naming file, row and column: a file cannot be read, a column is missing, a question is blank, an
            answer is absent although the source promises one, two rows share source and index, or there are no rows.
    """
    if target.suffix != ".parquet":
        raise InputError(f"{target}: the prepared file must end with .parquet")
    if limit is not None and limit < 1:
        raise InputError(f"limit: found {limit}; allowed: 1 or more rows")
    schema = _schema(inputs)
    skipped: list[str] | None = [] if skip_bad else None
    rows = _Rows(source, split, system_prompt, view, rename, skipped)
    statistics = _Statistics(tokenizer, {str(path): _questions_of(path) for path in against})
    target.parent.mkdir(parents=True, exist_ok=True)
    with replaced_whole(target) as temporary:
        with pq.ParquetWriter(temporary, schema) as writer:
            for batch in _batches(islice(rows.records(inputs), limit)):
                statistics.add(batch)
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
        if statistics.rows == 0:
            raise InputError(f"{', '.join(map(str, inputs))}: found no rows; allowed: at least one")
    summary = statistics.summary()
    summary.skipped = skipped or []
    return summary


def describe(file: Path, *, against: Sequence[Path] = (), tokenizer: Tokenizer | None = None) -> Summary:
    """The summary of a file that is prepared already."""
    statistics = _Statistics(tokenizer, {str(path): _questions_of(path) for path in against})
    for batch in _batches(
        {"prompt": list(row.messages), "reward_model": {"ground_truth": row.ground_truth}} for row in iter_rows(file)
    ):
        statistics.add(batch)
    return statistics.summary()


def _schema(inputs: Sequence[Path]) -> pa.Schema:
    """The published schema; indices are text if an input has them so (DAPO-Math names its questions)."""
    if all(pa.types.is_integer(kind) for kind in map(_index_type, inputs) if kind is not None):
        return SCHEMA
    extra_info = pa.struct([("index", pa.string()), ("split", pa.string())])
    return SCHEMA.set(SCHEMA.get_field_index("extra_info"), pa.field("extra_info", extra_info))


def _index_type(file: Path) -> pa.DataType | None:
    """Of the rows' names in a prepared file; None if it has none: faults are reported when it is read."""
    if not _is_published(file):
        return None
    schema = pq.read_schema(file)
    if "extra_info" not in schema.names:
        return schema.field("idx").type
    extra_info = schema.field("extra_info").type
    has_index = pa.types.is_struct(extra_info) and extra_info.get_field_index("index") >= 0
    return extra_info.field("index").type if has_index else None


def _batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(slots=True)
class _Rows:
    """How rows are read, and what was wrong with those that were left out (None: the first bad row is an error)."""

    source: DataSource
    split: str
    system_prompt: str | None
    view: View
    rename: bool
    skipped: list[str] | None

    def records(self, inputs: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """The records of all files, whose names differ."""
        as_text = _schema(inputs) is not SCHEMA
        uids: set[str] = set()
        first = 0
        for file in inputs:
            number = -1
            for number, record in enumerate(self._of(file, first)):
                if record is None:
                    continue
                index = record["extra_info"]["index"]
                uid = f"{record['data_source']}/{index}"
                if uid in uids:
                    raise InputError(
                        f"{file}, row {number}, column extra_info.index: found {index!r}, which an earlier row of the "
                        f"source {record['data_source']!r} has too; allowed: one row an index within a source, over "
                        "all inputs"
                    )
                uids.add(uid)
                if as_text:
                    record["extra_info"]["index"] = str(index)
                yield record
            first += number + 1

    def _of(self, file: Path, first: int) -> Iterator[dict[str, Any] | None]:
        """The records of one file, None for a row that is left out; rows without a name are counted from `first`."""
        if not _is_published(file):
            for number, (question, answer) in enumerate(_raw_rows(self.source, file)):
                try:
                    yield self._record(file, number, question, answer, first + number)
                except InputError as bad:
                    if self.skipped is None:
                        raise
                    self.skipped.append(str(bad))
                    yield None
            return
        for number, (row, (ability, own_split)) in enumerate(
            zip(iter_rows_or_faults(file, self.view), _labels(file), strict=True)
        ):
            if isinstance(row, InputError):
                if self.skipped is None:
                    raise row
                self.skipped.append(str(row))
                yield None
                continue
            ground_truth = read_answer(row.ground_truth, "as-is")
            if ground_truth is None and self.skipped is not None:
                self.skipped.append(f"{file}, row {number}: no answer")
                yield None
                continue
            yield {
                "data_source": self.source.data_source if self.rename else row.source,
                "prompt": list(row.messages),
                "ability": ability or self.source.ability,
                "reward_model": {"ground_truth": ground_truth, "style": "rule"},
                "extra_info": {"index": row.index, "split": own_split or self.split},
            }

    def _record(self, file: Path, number: int, question: Any, answer: Any, index: int) -> dict[str, Any]:
        source = self.source
        if not isinstance(question, str) or not question.strip():
            raise InputError(
                f"{file}, row {number}, column {source.question}: found {_short(question)}; allowed: a question"
            )
        for column, value in ((source.question, question), (source.answer, answer)):
            if isinstance(value, str) and not _is_unicode(value):
                raise InputError(
                    f"{file}, row {number}, column {column}: found half of a surrogate pair; "
                    "allowed: text that is valid Unicode"
                )
        ground_truth = read_answer(answer, source.answer_from)
        if ground_truth is None:
            wanted = {
                "as-is": "an answer",
                "boxed": r"a solution with a \boxed{} answer",
                "hashes": "an answer after ####",
            }
            raise InputError(
                f"{file}, row {number}, column {source.answer}: found {_short(answer)}; "
                f"allowed: {wanted[source.answer_from]}, or --skip-bad to leave such rows out"
            )
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return {
            "data_source": source.data_source,
            "prompt": [*system, {"role": "user", "content": question}],
            "ability": source.ability,
            "reward_model": {"ground_truth": ground_truth, "style": "rule"},
            "extra_info": {"index": index, "split": self.split},
        }


def _labels(file: Path) -> Iterator[tuple[str | None, str | None]]:
    """(ability, split) of each row of a prepared file; None if the file does not say."""
    with pq.ParquetFile(file) as parquet:
        names = [name for name in ("ability", "extra_info") if name in parquet.schema_arrow.names]
        if not names:  # a file of pairs says neither
            yield from repeat((None, None), parquet.metadata.num_rows)
            return
        for batch in parquet.iter_batches(BATCH_ROWS, columns=names):
            for row in batch.to_pylist():
                split = (row.get("extra_info") or {}).get("split")
                yield row.get("ability"), None if split is None else str(split)


def read_answer(value: Any, answer_from: AnswerFrom) -> str | None:
    """The ground truth in a cell of text or a finite number; None if there is none.

    A whole number that is stored or, if the column is the answer, written as a decimal is written as a whole one.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if not isinstance(value, str) and not math.isfinite(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if answer_from == "as-is":
        return (text.partition(".")[0] if _WHOLE.fullmatch(text) else text) or None
    return extract_answer(text, ("boxed",) if answer_from == "boxed" else ("hashes",))


def _short(value: Any) -> str:
    return text if len(text := repr(value)) < 80 else f"{text[:77]}..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_published(file: Path) -> bool:
    """Is it prepared already? With a prompt of plain text it is raw: DAPO-Math's files have the other columns too."""
    if file.suffix != ".parquet" or not file.is_file():
        return False
    if holds_pairs(file):
        return True
    try:
        schema = pq.read_schema(file)
        return set(schema.names) >= PUBLISHED and pa.types.is_nested(schema.field("prompt").type)
    except (pa.ArrowException, OSError):
        return False  # reading it says what is wrong


def _raw_rows(source: DataSource, file: Path) -> Iterator[tuple[Any, Any]]:
    """(question, answer) cells of a file."""
    if not file.is_file():
        raise InputError(f"{file}: found nothing there; allowed: a parquet, jsonl or json file")
    if file.suffix in (".jsonl", ".json"):
        yield from _json_rows(source, file)
        return
    try:
        with pq.ParquetFile(file) as parquet:
            for column in (source.question, source.answer):
                if column not in parquet.schema_arrow.names:
                    raise InputError(
                        f"{file}: found no column {column}, only {', '.join(parquet.schema_arrow.names)}; name the "
                        "columns with --question-column and --answer-column"
                    )
            columns = list(dict.fromkeys((source.question, source.answer)))
            for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                yield from zip(batch[source.question].to_pylist(), batch[source.answer].to_pylist(), strict=True)
    except (pa.ArrowException, OSError) as e:
        raise InputError(
            f"{file}: found a file that does not read as parquet ({e}); allowed: parquet, jsonl, json"
        ) from e


def _json_rows(source: DataSource, file: Path) -> Iterator[tuple[Any, Any]]:
    """The rows of a file with one JSON object a line, or of one array of them, which is read as a whole."""
    with file.open(encoding="utf-8-sig") as lines:  # some write a byte order mark
        try:
            for number, row in enumerate(_json_objects(file, lines)):
                for column in (source.question, source.answer):
                    if not isinstance(row, dict) or column not in row:
                        raise InputError(
                            f"{file}, row {number}: found no column {column}; allowed: a JSON object with it"
                        )
                yield row[source.question], row[source.answer]
        except UnicodeDecodeError as e:
            raise InputError(f"{file}: not UTF-8 text ({e})") from None


def _json_objects(file: Path, lines: TextIO) -> Iterator[Any]:
    start = next((line for line in lines if line.strip()), "")
    if start.lstrip().startswith("["):
        try:
            yield from json.loads(start + lines.read())
        except ValueError as e:
            raise InputError(f"{file}: not a JSON array ({e})") from None
        return
    for number, line in enumerate(filter(str.strip, chain([start], lines))):
        try:
            yield json.loads(line)
        except ValueError as e:
            raise InputError(f"{file}, row {number}: not a JSON object on one line ({e})") from None


def _questions_of(file: Path) -> set[int]:
    return {_key(row.messages[-1]["content"]) for row in iter_rows(file)}


def _key(question: str) -> int:
    return hash(normalised(question))


class _Statistics:
    """A summary under way. Of each question it keeps a hash and its lengths."""

    def __init__(self, tokenizer: Tokenizer | None, others: dict[str, set[int]]) -> None:
        self._tokenizer = tokenizer
        self._others = others
        self._characters: list[int] = []
        self._tokens: list[int] = []
        self._types: Counter[str] = Counter()
        self._seen: set[int] = set()
        self._duplicates = 0
        self._overlaps = dict.fromkeys(others, 0)

    @property
    def rows(self) -> int:
        return len(self._characters)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        questions = [record["prompt"][-1]["content"] for record in records]
        self._characters += map(len, questions)
        if self._tokenizer is not None:
            self._tokens += [len(ids) for ids in self._tokenizer(questions)["input_ids"]]
        self._types.update(answer_type(record["reward_model"]["ground_truth"]) for record in records)
        for question in questions:
            key = _key(question)
            self._duplicates += key in self._seen
            self._seen.add(key)
            for name, theirs in self._others.items():
                self._overlaps[name] += key in theirs

    def summary(self) -> Summary:
        return Summary(
            rows=self.rows,
            without_answer=self._types["none"],
            characters=_lengths(self._characters),
            tokens=_lengths(self._tokens) if self._tokenizer is not None else None,
            answer_types=dict(self._types.most_common()),
            duplicates=self._duplicates,
            overlaps=self._overlaps,
        )


def _lengths(values: Sequence[int]) -> Lengths:
    if not values:
        return Lengths()
    ordered = sorted(values)
    last = len(ordered) - 1
    return Lengths(ordered[0], ordered[last // 2], ordered[round(last * 0.99)], ordered[-1])
