"""Files become problems: paired by source and index, cut by prompt length, and every mismatch is named."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_coreward.data.dataset import ProblemSet, data_sets, load_problems
from megatron_coreward.data.parquet import PAIRS_SOURCE, Message, Row, write_rows
from megatron_coreward.errors import InputError

MATH = Path(os.environ.get("MEGATRON_COREWARD_PUBLISHED_DATA", "published")) / "math"  # and open-rs beside it


class WordTokenizer:
    """One token a word and no chat template."""

    chat_template = None

    def apply_chat_template(self, *_: object, **__: object) -> list[str]:
        raise AssertionError("there is no template")

    added_tokens_decoder: ClassVar[Mapping[int, Any]] = {}

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> Mapping[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in one.split()] for one in text]}


def write(path: Path, texts: Mapping[int, str], gold: str | None = "1", source: str = "set") -> Path:
    rows = [Row((Message(role="user", content=text),), gold, source, index) for index, text in texts.items()]
    write_rows(path, rows, split="train")
    return path


def load(
    train: Sequence[Path],
    rephrased: Sequence[Path] = (),
    limit: int = 100,
    drop: bool = False,
    system: str | None = None,
    unpaired: Literal["error", "drop"] = "error",
) -> ProblemSet:
    return load_problems(
        train,
        rephrased,
        WordTokenizer(),
        system_prompt=system,
        max_prompt_tokens=limit,
        over_length="drop" if drop else "error",
        unpaired=unpaired,
    )


def write_pairs(path: Path, texts: Mapping[int, tuple[str, str]], gold: str | None = "1") -> Path:
    """The form of the sets that are published as pairs."""
    rows = [
        {
            "idx": index,
            "original_question": original,
            "rephrased_question": rephrased,
            "solution": gold,
            "original_message": [{"role": "user", "content": original}],
            "rephrased_message": [{"role": "user", "content": rephrased}],
        }
        for index, (original, rephrased) in texts.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_views_pair_by_index_whatever_the_order_of_the_files(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {3: "three", 1: "one"}, gold="7")
    rephrased = write(tmp_path / "rephrased.parquet", {1: "eins", 3: "drei"}, gold=None)
    problems = load([train], [rephrased])
    assert [problem.uid for problem in problems] == ["set/3", "set/1"]
    assert [{view: prompt.text for view, prompt in problem.prompts.items()} for problem in problems] == [
        {"original": "three\n\n", "rephrased": "drei\n\n"},
        {"original": "one\n\n", "rephrased": "eins\n\n"},
    ]
    assert [problem.ground_truth for problem in problems] == ["7", "7"]


def test_without_rephrased_files_there_is_one_view(tmp_path: Path) -> None:
    problems = load([write(tmp_path / "train.parquet", {0: "a"})])
    assert [list(problem.prompts) for problem in problems] == [["original"]]


def test_several_files_follow_each_other_and_sources_keep_their_indices_apart(tmp_path: Path) -> None:
    train = [write(tmp_path / f"{name}.parquet", {0: name, 1: name}, source=name) for name in ("x", "y")]
    rephrased = [write(tmp_path / f"{name}r.parquet", {0: f"{name} r", 1: "r"}, source=name) for name in ("y", "x")]
    problems = load(train, rephrased)
    assert [problem.uid for problem in problems] == ["x/0", "x/1", "y/0", "y/1"]
    assert problems[2].prompts["rephrased"].text == "y r\n\n"
    assert [problem.source for problem in problems[1:3]] == ["x", "y"]


def test_the_system_prompt_reaches_every_view(tmp_path: Path) -> None:
    train, rephrased = (write(tmp_path / f"{name}.parquet", {0: name}) for name in ("a", "b"))
    (problem,) = load([train], [rephrased], system="Box it.")
    assert [prompt.text for prompt in problem.prompts.values()] == ["Box it.\n\na\n\n", "Box it.\n\nb\n\n"]


def test_a_problem_over_the_limit_in_one_view_is_dropped_in_both_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {0: "a b c", 1: "a b c d", 2: "a"}, gold=None)
    rephrased = write(tmp_path / "rephrased.parquet", {0: "a", 1: "a b c d e", 2: "a b c d"})
    problems = load([train], [rephrased], limit=3, drop=True)
    assert [problem.uid for problem in problems] == ["set/0"]
    assert (problems.num_dropped, problems.num_without_ground_truth, problems.longest_prompt) == (2, 1, 3)


def test_a_prompt_over_the_limit_is_an_error_that_names_the_longest(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {0: "a b c d", 1: "a b c d e", 2: "a"})
    with pytest.raises(InputError) as caught:
        load([train], limit=3)
    for part in ("max_prompt_tokens: found 3", "2 of 3 problems", f"5 tokens ({train}, row 1)", "over_length=drop"):
        assert part in str(caught.value)


def test_dropping_everything_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 1 problems"):
        load([write(tmp_path / "train.parquet", {0: "a b c d"})], limit=3, drop=True)


def test_a_rephrasing_without_an_original_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {0: "a"})
    rephrased = write(tmp_path / "rephrased.parquet", {0: "a", 5: "b", 6: "c"})
    with pytest.raises(InputError, match=r"rephrased\.parquet, row 1, .*found 5 .*no original \(2 such rows"):
        load([train], [rephrased])


def test_an_original_without_a_rephrasing_is_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {0: "a", 5: "b"})
    rephrased = write(tmp_path / "rephrased.parquet", {0: "a"})
    with pytest.raises(InputError, match=r"train\.parquet, row 1, .*found 5 .*no rephrasing \(1 such rows"):
        load([train], [rephrased])


def test_what_has_no_partner_is_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    """The published rephrasings lack some questions of the sets that they are made from, and `--skip-bad` others."""
    train = write(tmp_path / "train.parquet", {0: "a", 5: "b", 6: "c"})
    rephrased = write(tmp_path / "rephrased.parquet", {7: "w", 6: "x", 0: "y", 8: "z"})
    problems = load([train], [rephrased], unpaired="drop")
    assert [problem.uid for problem in problems] == ["set/0", "set/6"]
    assert [problem.prompts["rephrased"].text for problem in problems] == ["y\n\n", "x\n\n"]
    assert problems.num_unpaired == 3
    with pytest.raises(InputError, match="no original"):  # no pair at all is the wrong file
        load([train], [write(tmp_path / "other.parquet", {0: "a"}, source="other")], unpaired="drop")


def test_a_file_of_which_nothing_has_a_partner_is_refused_where_single_rows_are_left_out(tmp_path: Path) -> None:
    """With two sets in one run, the rephrasings of one may have been forgotten: its questions would go in silence."""
    one, two = (write(tmp_path / f"{name}.parquet", {0: "a", 1: "b"}, source=name) for name in ("one", "two"))
    other, more = (write(tmp_path / f"{name}-r.parquet", {0: "c"}, source=name) for name in ("one", "two"))
    assert len(load([one, two], [other, more], unpaired="drop")) == 2
    with pytest.raises(InputError, match=r"two\.parquet: found no row with a partner, .* 0 of the source 'two'"):
        load([one, two], [other], unpaired="drop")
    with pytest.raises(InputError, match=r"two-r\.parquet: found no row with a partner"):
        load([one], [other, more], unpaired="drop")


def test_a_file_of_pairs_is_both_views(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", {0: ("a", "x"), 3: ("b", "y")}, gold="7")
    problems = load([pairs], [pairs])
    assert [problem.uid for problem in problems] == [f"{PAIRS_SOURCE}/0", f"{PAIRS_SOURCE}/3"]
    assert [(p.prompts["original"].text, p.prompts["rephrased"].text) for p in problems] == [
        ("a\n\n", "x\n\n"),
        ("b\n\n", "y\n\n"),
    ]
    assert [problem.ground_truth for problem in problems] == ["7", "7"]
    assert [set(problem.prompts) for problem in load([pairs])] == [{"original"}] * 2


def test_a_pair_without_an_answer_or_with_bad_columns_is_seen(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", {0: ("a", "x")}, gold=None)
    assert load([pairs], [pairs]).num_without_ground_truth == 1
    for column, kind in (("rephrased_message", "a list of structs"), ("idx", "integer or string")):
        table = pq.read_table(pairs)
        place = table.schema.get_field_index(column)
        pq.write_table(table.set_column(place, column, pa.array([1.5])), tmp_path / "bad.parquet")
        with pytest.raises(InputError, match=rf"bad\.parquet, column {column}: found type double; allowed: {kind}"):
            load([tmp_path / "bad.parquet"], [tmp_path / "bad.parquet"])


def test_the_same_file_as_both_views_is_refused_where_it_holds_no_pairs(tmp_path: Path) -> None:
    train = write(tmp_path / "train.parquet", {0: "a"})
    with pytest.raises(InputError, match=r"data\.rephrased_files: .*is in data\.train_files too"):
        load([train], [train])


def answered(tmp_path: Path, golds: Sequence[str | None], sources: Sequence[str] | None = None) -> ProblemSet:
    rows = [
        Row((Message(role="user", content="a " * (i + 1)),), gold, source, i)
        for i, (gold, source) in enumerate(zip(golds, sources or ["set"] * len(golds), strict=True))
    ]
    write_rows(tmp_path / "answered.parquet", rows, split="train")
    return load([tmp_path / "answered.parquet"])


def test_questions_without_a_ground_truth_are_refused_dropped_or_kept(tmp_path: Path) -> None:
    problems = answered(tmp_path, ["1", " ", "3", None])
    with pytest.raises(InputError, match=r"^2 of 4 lack one; allowed: .*data\.missing_gold of drop or keep"):
        problems.with_ground_truth("error", "2 of 4 lack one")
    dropped = problems.with_ground_truth("drop", "")
    assert [problem.ground_truth for problem in dropped] == ["1", "3"]
    assert (dropped.num_without_ground_truth, dropped.num_unanswered, dropped.longest_prompt) == (0, 2, 3)
    kept = problems.with_ground_truth("keep", "")
    assert (len(kept), kept.num_without_ground_truth, kept.num_unanswered) == (4, 2, 0)
    assert dropped.with_ground_truth("error", "") is dropped
    with pytest.raises(InputError, match="nothing left.*missing_gold=keep"):
        answered(tmp_path, [None]).with_ground_truth("drop", "nothing left")


def test_problems_fall_into_the_sets_that_they_come_from(tmp_path: Path) -> None:
    parts = answered(tmp_path, ["1", None, "3"], ["gsm", "math", "gsm"]).by_source()
    assert {name: [p.uid for p in part] for name, part in parts.items()} == {
        "gsm": ["gsm/0", "gsm/2"],
        "math": ["math/1"],
    }
    assert [part.num_without_ground_truth for part in parts.values()] == [0, 1]
    assert [len(parts["gsm"].first(limit)) for limit in (None, 1, 9)] == [2, 1, 2]


def test_validation_sets_are_named_apart_by_file_and_folder_if_their_source_is_the_same(tmp_path: Path) -> None:
    """The published sets all have one source, and their test files one name."""

    def named(*places: tuple[str, str]) -> dict[str, list[str]]:
        files = []
        for place, source in places:
            (tmp_path / place).parent.mkdir(exist_ok=True)
            files.append(write(tmp_path / place, {0: place}, source=source))
        found = data_sets([(file, load([file])) for file in files])
        return {name: [p.prompts["original"].text.strip() for p in part] for name, part in found.items()}

    assert named(("a.parquet", "MATH"), ("b.parquet", "o/gsm8k")) == {"MATH": ["a.parquet"], "o/gsm8k": ["b.parquet"]}
    assert named(("a.parquet", "MATH"), ("b.parquet", "MATH")) == {"MATH/a": ["a.parquet"], "MATH/b": ["b.parquet"]}
    assert named(("x/t.parquet", "MATH"), ("y/t.parquet", "MATH"), ("z.parquet", "MATH/t")) == {
        f"MATH/{tmp_path}/x/t.parquet": ["x/t.parquet"],
        f"MATH/{tmp_path}/y/t.parquet": ["y/t.parquet"],
        f"MATH/t/{tmp_path}/z.parquet": ["z.parquet"],
    }


def test_an_index_in_two_files_is_named_with_both_places(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.parquet", {0: "a", 5: "b"}), write(tmp_path / "b.parquet", {5: "c"})
    with pytest.raises(InputError, match=r"b\.parquet, row 0, .*found 5 .*a\.parquet, row 1 has too; .*--data-source"):
        load([first, second])


def test_no_files_are_refused() -> None:
    with pytest.raises(InputError, match="found no data files"):
        load([])


@pytest.mark.skipif(not MATH.is_dir(), reason="MEGATRON_COREWARD_PUBLISHED_DATA names no such files")
def test_all_of_math_loads_and_pairs_within_seconds() -> None:
    tokenizer = pytest.importorskip("megatron_coreward.demo.tokenizer").byte_level_tokenizer()
    start = time.perf_counter()
    problems = load_problems(
        [MATH / "train_original.parquet"],
        [MATH / "train_rewrite_Qwen3-32B.parquet"],
        tokenizer,
        system_prompt="Think.",
        max_prompt_tokens=8192,
    )
    seconds = time.perf_counter() - start
    print(f"{len(problems)} pairs in {seconds:.1f} s, longest prompt {problems.longest_prompt} tokens")
    assert len(problems) == 7500
    assert problems.num_dropped == 0
    assert problems.num_without_ground_truth == 2  # two answers are blank in the published file
    assert all(set(problem.prompts) == {"original", "rephrased"} for problem in problems)
    sample = problems[100].prompts["rephrased"]
    assert tokenizer.decode(sample.token_ids) == sample.text
    assert sample.text.startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n")
    assert seconds < 60


@pytest.mark.parametrize(("folder", "count", "blank"), [("math", 7500, 2), ("open-rs", 6999, 1), ("dapo", 14109, 0)])
def test_ground_truth_can_train_on_the_published_sets(folder: str, count: int, blank: int) -> None:
    files = MATH.parent / folder
    if not files.is_dir():
        pytest.skip("MEGATRON_COREWARD_PUBLISHED_DATA names no such files")
    limits: dict[str, Any] = {"system_prompt": None, "max_prompt_tokens": 10**6}
    problems = load_problems([files / "train_original.parquet"], [], WordTokenizer(), **limits)
    assert (len(problems), problems.num_without_ground_truth) == (count, blank)
    assert len(problems.with_ground_truth("keep", "")) == count
    assert len(problems.with_ground_truth("drop", "")) == count - blank
    rephrased = [files / "train_rewrite_Qwen3-32B.parquet"]
    assert len(load_problems([files / "train_original.parquet"], rephrased, WordTokenizer(), **limits)) == count


@pytest.mark.skipif(not MATH.is_dir(), reason="MEGATRON_COREWARD_PUBLISHED_DATA names no such files")
def test_the_published_pairs_are_the_published_files(tmp_path: Path) -> None:
    pairs = [MATH / "train_pairs.parquet"]
    apart = [MATH / "train_original.parquet"], [MATH / "train_rewrite_Qwen3-32B.parquet"]
    one, other = load(pairs, pairs, limit=10**6), load(*apart, limit=10**6)
    assert [(p.prompts["rephrased"].text, p.ground_truth) for p in one] == [
        (p.prompts["rephrased"].text, p.ground_truth) for p in other
    ]


def test_rephrasings_of_another_set_that_shares_name_and_indices_are_refused_by_their_numbers(tmp_path: Path) -> None:
    questions = {i: f"Add {i + 3} and {7 * i + 11}." for i in range(80)}
    train = write(tmp_path / "train.parquet", questions)
    good = {i: f"What is {7 * i + 11} plus {i + 3}?" for i in range(80)}
    half = {i: text if i % 2 else f"What is {i} times nothing?" for i, text in good.items()}
    other = {i: f"What is {1000 + i} minus {i}?" for i in range(80)}
    for name, texts in (("good", good), ("half", half)):
        assert len(load([train], [write(tmp_path / f"{name}.parquet", texts)])) == 80
    with pytest.raises(InputError, match=r"numbers of the question in 0 of 80 rephrasings .* of other questions"):
        load([train], [write(tmp_path / "other.parquet", other)])
    few = write(tmp_path / "few.parquet", {i: questions[i] for i in range(20)})
    assert len(load([few], [write(tmp_path / "few_other.parquet", {i: other[i] for i in range(20)})])) == 20
