"""Files become problems: paired by source and index, cut by prompt length, and every mismatch is named."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.errors import InputError

MATH = Path(__file__).parents[3] / "shared" / "data" / "math"


class WordTokenizer:
    """One token a word and no chat template."""

    chat_template = None

    def apply_chat_template(self, *_: object, **__: object) -> list[str]:
        raise AssertionError("there is no template")

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, list[list[int]]]:
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
) -> ProblemSet:
    return load_problems(
        train,
        rephrased,
        WordTokenizer(),
        system_prompt=system,
        max_prompt_tokens=limit,
        over_length="drop" if drop else "error",
    )


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


def test_an_index_in_two_files_is_named_with_both_places(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.parquet", {0: "a", 5: "b"}), write(tmp_path / "b.parquet", {5: "c"})
    with pytest.raises(InputError, match=r"b\.parquet, row 0, .*found 5 .*a\.parquet, row 1 has too"):
        load([first, second])


def test_no_files_are_refused() -> None:
    with pytest.raises(InputError, match="found no data files"):
        load([])


@pytest.mark.skipif(not MATH.is_dir(), reason="the MATH files are not beside the checkout")
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
