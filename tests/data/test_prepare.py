"""prepare-data: every source becomes the published format, or one message says which cell is in the way."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.cli import main
from megatron_coreward.data import parquet as parquet_module
from megatron_coreward.data import prepare as module
from megatron_coreward.data.hub import split_files
from megatron_coreward.data.parquet import SCHEMA, Message, Row, read_rows, write_rows
from megatron_coreward.data.prepare import answer_type, describe, normalised, prepare, read_answer
from megatron_coreward.data.sources import SOURCES, find_source
from megatron_coreward.errors import InputError

MATH = Path(os.environ.get("MEGATRON_COREWARD_PUBLISHED_DATA", "published")) / "math"  # and open-rs beside it
RAW = [
    {"problem": f"What is {i} + {i}?", "solution": f"It is \\boxed{{{2 * i}}}.", "answer": f"{2 * i}"}
    for i in range(10)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(source: str, files: list[Path], out: Path, **changes: Any) -> module.Summary:
    settings: dict[str, Any] = {"split": "train", "system_prompt": "Think."} | changes
    return prepare(find_source(source), files, out, **settings)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("source", ["math", "open-rs", "math500"])
def test_rows_become_the_published_format(name: str, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    summary = run(source, [write(tmp_path / name, RAW)], out)
    assert pq.read_schema(out).equals(SCHEMA)
    rows = read_rows(out)
    assert [row.ground_truth for row in rows] == [str(2 * i) for i in range(10)]
    assert [row.index for row in rows] == list(range(10))
    assert rows[3].messages == ({"role": "system", "content": "Think."}, {"role": "user", "content": "What is 3 + 3?"})
    assert rows[0].source == SOURCES[source].data_source
    assert (summary.rows, summary.answer_types, summary.duplicates) == (10, {"integer": 10}, 0)


def test_gsm8k_answers_stand_after_the_hashes_and_floats_of_amc_are_whole_numbers(tmp_path: Path) -> None:
    gsm = write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "3 * 4 = 12\n#### 1,200"}])
    run("gsm8k", [gsm], tmp_path / "g.parquet")
    assert read_rows(tmp_path / "g.parquet")[0].ground_truth == "1,200"
    amc = write(tmp_path / "a.parquet", [{"problem": "How many?", "answer": 142.0}])
    run("amc", [amc], tmp_path / "out.parquet")
    assert read_rows(tmp_path / "out.parquet")[0].ground_truth == "142"


def test_whole_numbers_that_a_source_writes_as_decimals_are_whole(tmp_path: Path) -> None:
    answers = ["142.0", "-3.00", "2.50", "1.0.0", "x.0"]
    file = write(tmp_path / "a.jsonl", [{"problem": "How many?", "answer": answer} for answer in answers])
    run("amc", [file], tmp_path / "out.parquet")
    assert [row.ground_truth for row in read_rows(tmp_path / "out.parquet")] == ["142", "-3", "2.50", "1.0.0", "x.0"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["lines", "array", "indented array"])
def test_json_may_be_lines_or_one_array_with_a_byte_order_mark(form: str, mark: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    lines = "".join(json.dumps(row) + "\n" for row in RAW)
    text = lines if form == "lines" else json.dumps(RAW, indent=None if form == "array" else 2)
    file.write_text(mark + text, encoding="utf-8")
    run("math", [file], tmp_path / "out.parquet")
    assert [row.ground_truth for row in read_rows(tmp_path / "out.parquet")] == [str(2 * i) for i in range(10)]


def test_an_array_with_a_fault_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, message in (("[{]", "not a JSON array"), ('[{"problem": "Q"}]', "row 0: found no column solution")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            run("math", [file], tmp_path / "out.parquet")


def test_rows_without_an_answer_are_left_out_and_listed_and_the_others_keep_their_indices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [RAW[0], RAW[1] | {"answer": " "}, RAW[2], RAW[3] | {"answer": None}, RAW[4] | {"problem": ""}]
    file, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.parquet"
    with pytest.raises(InputError, match="row 1, column answer: found ' '; allowed: an answer, or --skip-bad"):
        run("open-rs", [file], out)
    assert main(["prepare-data", "open-rs", "--input", str(file), "--out", str(out), "--skip-bad"]) == 0
    said = capsys.readouterr().out
    assert "out.parquet: 2 questions" in said
    assert "left out: 3 rows" in said
    for place in ("row 1, column answer", "row 3, column answer", "row 4, column problem"):
        assert place in said
    assert [row.index for row in read_rows(out)] == [0, 2]
    second = write(tmp_path / "b.jsonl", RAW[:1])
    summary = run("open-rs", [file, second], out, skip_bad=True)
    assert [row.index for row in read_rows(out)] == [0, 2, 5]
    assert len(summary.skipped) == 3


def test_a_prepared_file_loses_its_blank_answers_too(tmp_path: Path) -> None:
    blank = [Row((Message(role="user", content=f"Q{i}"),), "7" if i else None, "set", i) for i in range(3)]
    write_rows(tmp_path / "in.parquet", blank, split="train")
    run("math", [tmp_path / "in.parquet"], tmp_path / "all.parquet")
    assert [row.ground_truth for row in read_rows(tmp_path / "all.parquet")] == [None, "7", "7"]
    summary = run("math", [tmp_path / "in.parquet"], tmp_path / "some.parquet", skip_bad=True)
    assert [row.index for row in read_rows(tmp_path / "some.parquet")] == [1, 2]
    assert len(summary.skipped) == 1


def test_a_prepared_file_loses_its_blank_questions_too(tmp_path: Path) -> None:
    texts = ("Q0", " ", "Q2")
    rows = [Row((Message(role="user", content=text),), "7", "set", i) for i, text in enumerate(texts)]
    write_rows(tmp_path / "in.parquet", rows, split="train")
    with pytest.raises(InputError, match="row 1, column prompt: found a blank user message"):
        run("math", [tmp_path / "in.parquet"], tmp_path / "out.parquet")
    summary = run("math", [tmp_path / "in.parquet"], tmp_path / "out.parquet", skip_bad=True)
    assert [row.index for row in read_rows(tmp_path / "out.parquet")] == [0, 2]
    assert ["row 1, column prompt" in fault for fault in summary.skipped] == [True]


def test_whole_numbers_of_a_prepared_file_are_written_as_such(tmp_path: Path) -> None:
    """The release's AMC questions have 142.0 where the answer is 142."""
    answers = ("142.0", "-4.0", "2.5", "x.0")
    rows = [Row((Message(role="user", content=f"Q{i}"),), answer, "set", i) for i, answer in enumerate(answers)]
    write_rows(tmp_path / "in.parquet", rows, split="train")
    run("amc", [tmp_path / "in.parquet"], tmp_path / "out.parquet")
    assert [row.ground_truth for row in read_rows(tmp_path / "out.parquet")] == ["142", "-4", "2.5", "x.0"]


def test_a_source_without_a_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", RAW)
    assert main(["prepare-data", "math", "--input", str(file), "--data-source", ""]) == 2
    assert "--data-source: found no name" in capsys.readouterr().err


def test_two_sets_that_call_themselves_the_same_fit_into_one_run_under_another_name(tmp_path: Path) -> None:
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    run("math", [write(tmp_path / "a.jsonl", RAW)], first)
    for again in ([write(tmp_path / "b.jsonl", RAW)], [first]):  # a raw file, and one that is prepared already
        command = ["prepare-data", "math", "--input", *map(str, again), "--out", str(second)]
        assert main(command) == 0
        assert read_rows(second)[3].uid == read_rows(first)[3].uid
        assert main([*command, "--data-source", "other"]) == 0
        assert [row.uid for row in read_rows(second)] == [f"other/{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("source", "split", "path"),
    [
        ("math", "train", "data/math/train_original.parquet"),
        ("math", "test", "data/math/test.parquet"),
        ("dapo-math", "train", "data/dapo/train_original.parquet"),
        ("open-rs", "train", "data/open-rs/train_original.parquet"),
    ],
)
def test_what_is_prepared_lies_where_the_recipes_look_and_pairs_with_the_published_rephrasings(
    source: str, split: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    question = SOURCES[source].question
    rows = [{question: row["problem"], "solution": row["solution"], "answer": row["answer"]} for row in RAW]
    write(tmp_path / "raw.jsonl", rows)
    assert main(["prepare-data", source, "--input", "raw.jsonl", "--split", split]) == 0
    parts = (Path(__file__).parents[2] / "configs" / "parts").glob("**/*.yaml")
    assert any(path in part.read_text() for part in parts)
    # The published sets all call themselves so, and count from 0.
    assert [row.uid for row in read_rows(Path(path))] == [f"DigitalLearningGmbH/MATH-lighteval/{i}" for i in range(10)]


def test_a_file_where_the_recipes_look_is_replaced_only_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    published = Path("data/math/train_original.parquet")
    command = ["prepare-data", "math", "--input", str(write(tmp_path / "raw.jsonl", RAW)), "--limit", "2"]
    published.parent.mkdir(parents=True)
    published.write_bytes(b"published")
    assert main(command) == 2
    assert "data/math/train_original.parquet exists; give it as --out to replace it" in capsys.readouterr().err
    assert published.read_bytes() == b"published"
    assert main([*command, "--out", str(published)]) == 0
    assert len(read_rows(published)) == 2


def test_either_view_of_a_file_of_pairs_can_be_taken(tmp_path: Path) -> None:
    messages = [[{"role": "user", "content": text}] for text in ("first", "second")]
    pair = {"idx": 4, "original_message": messages[0], "rephrased_message": messages[1], "solution": "7"}
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "pairs.parquet")
    for view, text in (("original", "first"), ("rephrased", "second")):
        out = tmp_path / f"{view}.parquet"
        options = ["--view", view, "--data-source", "mine", "--out", str(out)]
        assert main(["prepare-data", "math", "--input", str(tmp_path / "pairs.parquet"), *options]) == 0
        (row,) = read_rows(out)
        assert (row.uid, row.messages[-1]["content"], row.ground_truth) == ("mine/4", text, "7")


def test_a_set_of_any_size_is_written_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 4)
    out = tmp_path / "out.parquet"
    run("math", [write(tmp_path / "a.jsonl", RAW), write(tmp_path / "b.jsonl", RAW)], out, limit=15)
    assert [pq.ParquetFile(out).metadata.row_group(i).num_rows for i in range(4)] == [4, 4, 4, 3]
    assert [row.index for row in read_rows(out)] == list(range(15))


def test_duplicates_and_questions_of_other_files_are_counted(tmp_path: Path) -> None:
    other = tmp_path / "test.parquet"
    run("math", [write(tmp_path / "b.jsonl", RAW[:3])], other)
    twice = [*RAW, RAW[4] | {"problem": " what  is 4 + 4? "}]
    summary = run("math", [write(tmp_path / "a.jsonl", twice)], tmp_path / "out.parquet", against=[other])
    assert (summary.duplicates, summary.overlaps) == (1, {str(other): 3})
    assert describe(tmp_path / "out.parquet", against=[other]) == summary


def test_a_prepared_file_passes_through_as_it_is(tmp_path: Path) -> None:
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    run("math", [write(tmp_path / "a.jsonl", RAW)], first)
    run("gsm8k", [first], second, system_prompt="Another.")
    assert read_rows(second) == read_rows(first)


def test_dapo_files_whose_prompt_is_text_beside_the_published_columns_are_raw(tmp_path: Path) -> None:
    """The layout of open-r1/DAPO-Math-17k-Processed."""
    row = {
        "prompt": "What is 30 + 4?",
        "solution": "34",
        "data_source": "math_dapo",
        "source_prompt": [{"content": "Solve: What is 30 + 4?", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }
    run("dapo-math", [write(tmp_path / "a.parquet", [row])], tmp_path / "out.parquet")
    (found,) = read_rows(tmp_path / "out.parquet")
    assert (found.messages[-1]["content"], found.ground_truth, found.index) == ("What is 30 + 4?", "34", 0)


def test_names_abilities_and_splits_of_prepared_files_stay(tmp_path: Path) -> None:
    row = {
        "prompt": [{"content": "What is 30 + 4?", "role": "user"}],
        "data_source": "math_dapo",
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": "9a9b6eb4", "split": "test"},
    }
    run("math", [write(tmp_path / "a.parquet", [row]), write(tmp_path / "b.jsonl", RAW)], tmp_path / "out.parquet")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows[0] == row
    assert [r["extra_info"]["index"] for r in rows] == ["9a9b6eb4", *map(str, range(1, 11))]
    assert len(read_rows(tmp_path / "out.parquet")) == 11


def test_two_inputs_whose_rows_have_one_name_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "1.parquet", tmp_path / "2.parquet"
    for out in (one, two):
        run("math", [write(tmp_path / "a.jsonl", RAW)], out)
    with pytest.raises(InputError, match=r"2\.parquet, row 0, column extra_info\.index: found 0, which an earlier row"):
        run("math", [one, two], tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_rows_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="limit: found"):
        run("math", [write(tmp_path / "a.jsonl", RAW)], tmp_path / "out.parquet", limit=limit)


def test_a_prepared_file_is_read_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.parquet"
    run("math", [write(tmp_path / "a.jsonl", RAW)], out)
    monkeypatch.setattr(parquet_module, "BATCH_ROWS", 3)
    whole = list(parquet_module.iter_rows(out))
    assert whole == read_rows(out)
    assert [row.index for row in whole] == list(range(10))
    taken: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counted(*args: Any, **kwargs: Any) -> Any:
        for batch in original(*args, **kwargs):
            taken.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    next(parquet_module.iter_rows(out))
    assert taken == [3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "Q"}], r"row 0: found no column solution"),
        (
            [RAW[0], {"problem": " ", "solution": "\\boxed{1}"}],
            r"row 1, column problem: found ' '; allowed: a question",
        ),
        ([RAW[0], {"problem": "Q", "solution": "so 4"}], r"row 1, column solution: found 'so 4'; .*\\boxed"),
        ([{"problem": 3, "solution": "\\boxed{1}"}], r"row 0, column problem: found 3"),
        ([{"problem": "a \ud800", "solution": "\\boxed{1}"}], r"row 0, column problem: found half of a surrogate"),
        ([RAW[0], {"problem": "Q", "solution": {"text": "\\boxed{1}"}}], r"row 1, column solution: found {'text'"),
        ([RAW[0], {"problem": "Q", "solution": float("nan")}], r"row 1, column solution: found nan"),
        ([], "found no rows"),
    ],
)
def test_a_bad_cell_is_named_and_nothing_is_left(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    file, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.parquet"
    with pytest.raises(InputError, match=message):
        run("math", [file], out)
    assert sorted(tmp_path.iterdir()) == [file]


def test_bad_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl"
    broken.write_text("{\n")
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1 is not enough")
    columns = write(tmp_path / "b.parquet", [{"q": "a", "a": "b"}])
    for file, message in (
        (broken, "row 0: not a JSON object"),
        (parquet, "does not read as parquet"),
        (columns, "found no column problem, only q, a; name the columns"),
        (tmp_path / "none.jsonl", "found nothing there"),
    ):
        with pytest.raises(InputError, match=message):
            run("math", [file], tmp_path / "out.parquet")


def test_the_command_prints_a_summary_and_answers_bad_input_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": "How many?", "a": "1/2"}])
    custom = ["prepare-data", "custom", "--input", str(file), "--out", str(tmp_path / "out.parquet")]
    assert main(custom) == 2
    assert "needs --question-column" in capsys.readouterr().err
    assert main([*custom, "--question-column", "q", "--answer-column", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer_types"] == {"fraction": 1}
    assert main(["prepare-data", "math500", "--split", "train", "--out", "x.parquet"]) == 2
    assert main(["prepare-data", *custom[1:4], "--question-column", "q", "--answer-column", "a"]) == 2
    assert "--out: source custom needs a file to write" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> list[str]:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    assert main(["prepare-data", "gsm8k", "--out", str(tmp_path / "x.parquet")]) == 2
    assert "openai/gsm8k could not be fetched" in capsys.readouterr().err


def test_a_missing_hub_client_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["prepare-data", "gsm8k", "--out", str(tmp_path / "x.parquet")]) == 2
    assert "openai/gsm8k needs the package huggingface_hub" in capsys.readouterr().err


def test_files_of_a_split_are_found_in_the_layouts_of_the_hub() -> None:
    gsm = [
        "README.md",
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
        "socratic/train-0.parquet",
    ]
    assert split_files(gsm, "main", "train") == ["main/train-00000-of-00001.parquet"]
    assert split_files(["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], None, "train") == [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    assert split_files(["test.jsonl"], None, "test") == ["test.jsonl"]
    assert split_files(["test.jsonl"], None, "train") == []


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("12", "integer"),
        ("-1,200", "integer"),
        ("0.5", "decimal"),
        ("50%", "integer"),
        (r"\frac{1}{2}", "fraction"),
        ("3/4", "fraction"),
        (r"\text{(A)}", "text"),
        ("Monday", "text"),
        ("x", "expression"),
        (r"\sqrt{2}", "expression"),
        ("", "none"),
        (None, "none"),
    ],
)
def test_types_of_answers(answer: str | None, kind: str) -> None:
    assert answer_type(answer) == kind


@given(st.text(), st.sampled_from(["as-is", "boxed", "hashes"]))
def test_any_text_has_an_answer_or_none_and_a_type(text: str, form: Any) -> None:
    answer = read_answer(text, form)
    assert answer is None or answer.strip()
    assert answer_type(answer) in {"integer", "decimal", "fraction", "text", "expression", "none"}


@given(st.text(), st.text(alphabet=" \t\n"))
def test_spacing_and_case_do_not_make_another_question(text: str, space: str) -> None:
    assert normalised(space + text + space) == normalised(text)


@pytest.mark.skipif(not MATH.is_dir(), reason="MEGATRON_COREWARD_PUBLISHED_DATA names no such files")
def test_the_published_math_files_load_and_pair_up() -> None:
    originals = read_rows(MATH / "train_original.parquet")
    rephrased = read_rows(MATH / "train_rewrite_Qwen3-32B.parquet")
    assert len(originals) == 7500
    assert {row.uid for row in originals} == {row.uid for row in rephrased}
    summary = describe(MATH / "train_original.parquet", against=[MATH / "test.parquet"])
    assert summary.rows == 7500
    assert (summary.without_answer, summary.duplicates) == (2, 2)
