"""Files of the published format read as they were written, and every fault of a file is named."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.data.parquet import Message, Row, read_rows, write_rows
from megatron_coreward.errors import InputError

SYSTEM, USER = {"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}


def record(index: Any = 0, prompt: Any = None, gold: Any = "2", source: Any = "set") -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [SYSTEM, USER] if prompt is None else prompt,
        "ability": "math",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def write(path: Path, *records: dict[str, Any], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(list(records), schema=schema), path)
    return path


def without(column: str) -> dict[str, Any]:
    return {name: value for name, value in record().items() if name != column}


TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
USER_TURN = TEXT.filter(str.strip).map(lambda text: (Message(role="user", content=text),))
SYSTEM_TURN = st.just(()) | TEXT.map(lambda text: (Message(role="system", content=text),))
ROWS = st.lists(
    st.builds(
        Row,
        messages=st.tuples(SYSTEM_TURN, USER_TURN).map(lambda turns: turns[0] + turns[1]),
        ground_truth=st.none() | TEXT.filter(str.strip),
        source=st.sampled_from(["a", "b"]),
        index=st.integers(-(2**63), 2**63 - 1),
    ),
    min_size=1,
    unique_by=lambda row: row.uid,
)


@given(rows=ROWS)
def test_rows_come_back_as_they_were_written(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.parquet"
    write_rows(file, rows, split="train")
    assert read_rows(file) == rows
    assert [path.name for path in file.parent.iterdir()] == ["rows.parquet"]


def test_written_files_have_the_published_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "new" / "x.parquet", [Row((Message(role="user", content="q"),), "7", "set", 3)], split="test")
    assert pq.read_table(tmp_path / "new" / "x.parquet").to_pylist() == [
        {
            "data_source": "set",
            "prompt": [{"content": "q", "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": "7", "style": "rule"},
            "extra_info": {"index": 3, "split": "test"},
        }
    ]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    good = Row((Message(role="user", content="q"),), None, "set", 0)
    write_rows(file, [good], split="train")
    with pytest.raises(pa.ArrowException):
        write_rows(file, [good, Row(good.messages, None, "set", "not an integer")], split="train")
    assert read_rows(file) == [good]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("gold", [None, "", "  \n"])
def test_a_blank_ground_truth_is_none(tmp_path: Path, gold: str | None) -> None:
    file = write(tmp_path / "x.parquet", record(0, gold=gold), record(1, gold="5"))
    assert [row.ground_truth for row in read_rows(file)] == [None, "5"]


@pytest.mark.parametrize("reward_model", ["absent", None, {"style": "rule"}])
def test_a_file_needs_no_ground_truth(tmp_path: Path, reward_model: Any) -> None:
    row = without("reward_model") if reward_model == "absent" else record() | {"reward_model": reward_model}
    assert read_rows(write(tmp_path / "x.parquet", row))[0].ground_truth is None


def test_integer_answers_string_indices_and_categorical_sources_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.parquet", record("0c3f", gold=34), record("77aa", gold=-1))
    table = pq.read_table(file)
    place = table.column_names.index("data_source")
    pq.write_table(table.set_column(place, "data_source", table["data_source"].dictionary_encode()), file)
    assert [(row.uid, row.ground_truth) for row in read_rows(file)] == [("set/0c3f", "34"), ("set/77aa", "-1")]


def test_the_same_index_in_two_sources_is_no_duplicate(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "x.parquet", record(0, source="a"), record(0, source="b")))
    assert [row.uid for row in rows] == ["a/0", "b/0"]


GIVEN_TURNS = [USER, {"role": "assistant", "content": "2"}, USER]


def test_a_conversation_may_have_earlier_messages(tmp_path: Path) -> None:
    assert list(read_rows(write(tmp_path / "x.parquet", record(prompt=GIVEN_TURNS)))[0].messages) == GIVEN_TURNS


@pytest.mark.parametrize(
    ("records", "where", "found", "allowed"),
    [
        ([without("prompt")], ": found no column prompt", "data_source, ability", "reward_model"),
        ([without("data_source")], ": found no column data_source", "prompt", "extra_info"),
        ([without("extra_info")], ": found no column extra_info", "prompt", "extra_info"),
        ([record() | {"prompt": "1+1?"}], "column prompt", "type string", "list of structs"),
        ([record() | {"prompt": ["1+1?"]}], "column prompt", "type list<", "strings role and content"),
        ([record() | {"prompt": [{"role": "user"}]}], "column prompt", "type list<", "strings role and content"),
        ([record() | {"data_source": 3}], "column data_source", "type int64", "string"),
        ([record() | {"extra_info": 3}], "column extra_info", "type int64", "integer or string index"),
        ([record() | {"extra_info": {"split": "train"}}], "column extra_info", "type struct<split", "index"),
        ([record(index=0.5)], "column extra_info", "type struct<index: double", "integer or string index"),
        ([record(gold=0.5)], "column reward_model", "ground_truth: double", "string or integer ground_truth"),
        ([record() | {"reward_model": "2"}], "column reward_model", "type string", "a struct"),
        ([record(0), record(1, source=None)], "row 1, column data_source", "None", "a non-empty string"),
        ([record(0), record(1, source="")], "row 1, column data_source", "''", "a non-empty string"),
        ([record(0), record(None)], "row 1, column extra_info.index", "None", "an integer"),
        ([record(""), record("b")], "row 0, column extra_info.index", "''", "non-empty string"),
        ([record(4), record(5), record(4)], "row 2, column extra_info.index", "4, which row 0 has too", "source 'set'"),
        ([record(0), record(1, prompt=[])], "row 1, column prompt", "roles []", "a user message at the end"),
        ([record(0), record(1) | {"prompt": None}], "row 1, column prompt", "roles []", "a user message at the end"),
        ([record(prompt=[SYSTEM])], "row 0, column prompt", "roles ['system']", "a user message at the end"),
        ([record(prompt=GIVEN_TURNS[:2])], "row 0, column prompt", "'assistant']", "a user message at the end"),
        ([record(prompt=[USER, SYSTEM])], "row 0, column prompt[1].role", "'system'", "first message only"),
        ([record(prompt=[USER | {"role": "robot"}])], "row 0, column prompt[0].role", "'robot'", "user, assistant"),
        ([record(prompt=[USER | {"role": None}, USER])], "row 0, column prompt[0].role", "None", "user, assistant"),
        ([record(prompt=[None, USER])], "row 0, column prompt[0].role", "None", "user, assistant"),
        ([record(prompt=[SYSTEM | {"content": None}, USER])], "row 0, column prompt[0].content", "None", "a string"),
        ([record(prompt=[USER | {"content": " \n"}])], "row 0, column prompt", "a blank user message", "with text"),
    ],
)
def test_a_fault_is_named_with_its_place_and_what_is_allowed(
    tmp_path: Path, records: list[dict[str, Any]], where: str, found: str, allowed: str
) -> None:
    file = write(tmp_path / "bad.parquet", *records)
    with pytest.raises(InputError) as caught:
        read_rows(file)
    place, _, rest = str(caught.value).partition("; allowed: ")
    assert place.startswith(str(file))
    assert where in place
    assert found in place
    assert allowed in rest


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    schema = pa.Table.from_pylist([record()]).schema
    with pytest.raises(InputError, match=r"x\.parquet: found no rows; allowed: at least one"):
        read_rows(write(tmp_path / "x.parquet", schema=schema))


def test_a_path_without_a_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not parquet at all")
    for name, found in (("missing.parquet", "nothing"), (".", "a directory"), ("text.parquet", "not read as parquet")):
        with pytest.raises(InputError, match=f"found .*{found}.*; allowed: a parquet file"):
            read_rows(tmp_path / name)
