"""Rephrasing a file: nothing is lost or asked twice, whatever happens, and only what passes is written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_coreward.data.dataset import load_problems
from megatron_coreward.data.parquet import Message, Row, read_rows, write_rows
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation import rephrase as module
from megatron_coreward.evaluation.evaluate import Engines
from megatron_coreward.evaluation.rephrase import Rewriting, RewritingJob, rephrase_file
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.telemetry.job_log import JobLog
from megatron_coreward.types import Completion

QUESTIONS = [f"A baker sells {7 + i} loaves a day for {20 + i} days. How many loaves is that?" for i in range(6)]


def good(i: int) -> str:
    return (
        f"<rewritten>Over {20 + i} nights an owl catches {7 + i} mice each night; find the total of mice.</rewritten>"
    )


class Words:
    """A tokenizer of one token a character."""

    chat_template = None

    added_tokens_decoder: ClassVar[Mapping[int, Any]] = {}

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool = False
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in one] for one in text]}

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("there is no chat template")


class FakeEngines:
    """Replies by the number of the question; `replies[i]` are those of its attempts."""

    def __init__(self, replies: dict[int, list[str]], dies_after: int = 10**9) -> None:
        self.replies, self.left = replies, dies_after
        self.asked: list[tuple[int, int]] = []  # (question, seed)
        self.solved = 0  # requests to the solver

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        answers = []
        for request in requests:
            text = "".join(map(chr, request.prompt))
            number = next((i for i, q in enumerate(QUESTIONS) if q in text), None)
            if number is None or request.n > 1:  # the solver's turn
                self.solved += 1
                other = "owl" in text and "25 nights" in text
                answers.append([self._sample("\\boxed{1}" if other else "\\boxed{2}")] * request.n)
                continue
            earlier = sum(asked == number for asked, _ in self.asked)
            self.asked.append((number, request.seed))
            answers.append([self._sample(self.replies[number][min(earlier, len(self.replies[number]) - 1)])])
        return answers

    @staticmethod
    def _sample(text: str) -> Completion:
        return Completion(np.zeros(1, np.int32), np.zeros(1, np.float32), text, None, "stop", 0)


ALL_GOOD = {i: [good(i)] for i in range(6)}


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    write_rows(
        tmp_path / "source.parquet",
        [Row((Message(role="user", content=q),), str(i), "fake", 10 * i) for i, q in enumerate(QUESTIONS)],
        split="train",
    )
    return read_rows(tmp_path / "source.parquet")


def job(
    rows: list[Row], folder: Path, engines: FakeEngines, *, max_solver_prompt: int = 10**6, **settings: Any
) -> Iterator[RewritingJob]:
    with JobLog(folder / "replies.jsonl", {"job": 1}) as job_log, AnswerEquivalence("exact") as equivalence:
        made = RewritingJob(
            rows, job_log, Words(), Rewriting(batch_rows=2, **settings), equivalence, None, max_solver_prompt
        )
        made.run(engines, lambda done, total: None)
        yield made


def test_what_was_refused_is_asked_again_with_another_seed(rows: list[Row], tmp_path: Path) -> None:
    engines = FakeEngines(
        ALL_GOOD | {1: ["no tags", good(1)], 4: ["no tags"], 5: [f"<rewritten>{QUESTIONS[5]}</rewritten>"]}
    )
    (done,) = job(rows, tmp_path, engines)
    report = done.report()
    assert (report.rows, report.written, report.replies) == (6, 4, 3 + 2 + 3 + 3)
    assert report.written_by_attempt == [3, 1, 0]
    assert report.left_out == ["fake/40", "fake/50"]
    assert report.refused_replies == {"0 opening and 0 closing tags": 4}
    assert report.failed_checks == {"not_a_copy": 3}
    assert len(set(engines.asked)) == len(engines.asked)  # never the same question with the same seed


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_kill_loses_a_batch_at_most_and_nothing_is_asked_twice(calls: int, rows: list[Row], tmp_path: Path) -> None:
    replies = ALL_GOOD | {1: ["no tags", good(1)]}
    dying = FakeEngines(replies, dies_after=calls)
    if calls < 4:
        with pytest.raises(RuntimeError, match="killed"):
            list(job(rows, tmp_path, dying))
    whole = FakeEngines(replies)
    whole.asked = list(dying.asked)
    (done,) = job(rows, tmp_path, whole)
    assert done.report().written == 6
    assert len(whole.asked) == len(set(whole.asked)) == 7


def test_the_solver_refuses_a_rewriting_with_another_answer(rows: list[Row], tmp_path: Path) -> None:
    """The fake solver answers 1 to a rewriting about 25 nights, and 2 to everything else."""
    (done,) = job(rows, tmp_path, FakeEngines(ALL_GOOD), solver_samples=3, attempts=1)
    assert done.report().left_out == ["fake/50"]
    assert done.report().failed_checks == {"solver": 1}
    assert done.replies(rows[5])[0]["majorities"] == ["2", "1"]
    assert done.replies(rows[0])[0]["majorities"] == ["2", "2"]


def test_the_solver_answers_an_original_once_however_often_it_is_rewritten(rows: list[Row], tmp_path: Path) -> None:
    engines = FakeEngines({**ALL_GOOD})
    (done,) = job(rows, tmp_path, engines, solver_samples=3, attempts=3)
    assert [len(done.replies(row)) for row in rows] == [1, 1, 1, 1, 1, 3]  # the solver refuses the last one each time
    assert [item["majorities"] for item in done.replies(rows[5])] == [["2", "1"]] * 3
    assert engines.solved == 6 + 6 + 2


def test_a_rewriting_that_is_too_long_for_the_solver_is_refused_not_fatal(rows: list[Row], tmp_path: Path) -> None:
    longest = max(len(good(i)) for i in range(6)) - len("<rewritten></rewritten>")
    long = good(2).replace("an owl", "an old, grey and very patient owl")
    engines = FakeEngines(ALL_GOOD | {2: [long]})
    (done,) = job(rows, tmp_path, engines, max_solver_prompt=longest + 20, solver_samples=3, attempts=1)
    assert done.replies(rows[2])[0]["checks"] | {"solver": False, "length": False} == done.replies(rows[2])[0]["checks"]
    assert done.report().failed_checks == {"solver": 2, "length": 1}  # the other is question 5
    assert done.report().left_out == ["fake/20", "fake/50"]


def test_without_the_filter_every_reply_that_can_be_read_is_taken_and_its_checks_are_kept(
    rows: list[Row], tmp_path: Path
) -> None:
    copied = FakeEngines(ALL_GOOD | {1: ["no tags"], 5: [f"<rewritten>{QUESTIONS[5]}</rewritten>"]})
    (done,) = job(rows, tmp_path, copied, filter=False, attempts=1)
    assert done.report().left_out == ["fake/10"]
    assert done.report().failed_checks == {"not_a_copy": 1}


def test_the_papers_prompt_asks_in_its_words_and_reads_its_markers(rows: list[Row], tmp_path: Path) -> None:
    replies = {i: [good(i).replace("<rewritten>", "### RESULT_START\nORIGINAL:\nx\nREWRITE:\n")] for i in range(6)}
    replies = {i: [texts[0].replace("</rewritten>", "\n### RESULT_END")] for i, texts in replies.items()}
    (done,) = job(rows, tmp_path, FakeEngines(replies), prompt="paper")
    assert done.report().written == 6
    assert done.replies(rows[0])[0]["text"] == good(0).removeprefix("<rewritten>").removesuffix("</rewritten>")


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from contextlib import nullcontext

    replies = ALL_GOOD | {4: ["no tags <b>&</b>"]}
    for model in ("a-model", "m"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path: Words())
    monkeypatch.setattr(module, "model_fingerprint", lambda path: "fake")
    monkeypatch.setattr(module, "running_engines", lambda *args: nullcontext(FakeEngines(replies)))


@pytest.mark.usefixtures("no_engines")
def test_the_files_pair_and_carry_where_each_row_came_from(rows: list[Row], tmp_path: Path) -> None:
    target = tmp_path / "rewritten.parquet"
    report = rephrase_file(tmp_path / "a-model", tmp_path / "source.parquet", target, Rewriting(), Engines())
    assert (report.written, report.left_out) == (5, ["fake/40"])
    originals = tmp_path / "rewritten.originals.parquet"
    limits: dict[str, Any] = {"system_prompt": None, "max_prompt_tokens": 10**6}
    problems = load_problems([originals], [target], Words(), **limits)
    assert [p.uid for p in problems] == ["fake/0", "fake/10", "fake/20", "fake/30", "fake/50"]
    with pytest.raises(InputError, match="no rephrasing"):
        load_problems([tmp_path / "source.parquet"], [target], Words(), **limits)
    row = pq.read_table(target).to_pylist()[0]["rephrase"]
    assert (row["model"], row["attempt"]) == ("a-model", 0)
    assert set(json.loads(row["checks"]).values()) == {True}
    page = (tmp_path / "rewritten.report.html").read_text()
    assert "5 of 6 questions rewritten (83.3%)" in page
    assert "no tags &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "<b>" not in page
    assert json.loads((tmp_path / "rewritten.report.json").read_text())["written"] == 5


@pytest.mark.usefixtures("no_engines")
def test_another_job_does_not_mix_with_the_log(rows: list[Row], tmp_path: Path) -> None:
    arguments = (tmp_path / "m", tmp_path / "source.parquet", tmp_path / "out.parquet")
    rephrase_file(*arguments, Rewriting(), Engines())
    with pytest.raises(InputError, match="a log of other work"):
        rephrase_file(*arguments, Rewriting(temperature=0.9), Engines())
    rephrase_file(*arguments, Rewriting(attempts=5, batch_rows=1, refused="keep_original"), Engines())


@pytest.mark.usefixtures("no_engines")
def test_a_log_is_not_continued_with_other_questions_of_the_same_names(rows: list[Row], tmp_path: Path) -> None:
    source = tmp_path / "source.parquet"
    arguments = (tmp_path / "m", source, tmp_path / "out.parquet")
    rephrase_file(*arguments, Rewriting(), Engines())
    others = [Row((Message(role="user", content="What is 9 times 9?"),), "81", row.source, row.index) for row in rows]
    write_rows(source, others, split="train")
    with pytest.raises(InputError, match="a log of other work .*fingerprint"):
        rephrase_file(*arguments, Rewriting(), Engines())


@pytest.mark.usefixtures("no_engines")
def test_a_file_of_pairs_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    """Its rows can be read, but what is written has the columns of a file of questions."""
    source = tmp_path / "pairs.parquet"
    message = [{"role": "user", "content": QUESTIONS[0]}]
    pq.write_table(
        pa.table({"idx": [0], "original_message": [message], "rephrased_message": [message], "solution": ["1"]}), source
    )
    with pytest.raises(InputError, match=r"pairs\.parquet: found pairs .*--view original"):
        rephrase_file(tmp_path / "m", source, tmp_path / "out.parquet", Rewriting(), Engines())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("no_engines")
def test_a_question_without_rewriting_may_stay_as_it_is_and_says_so(rows: list[Row], tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    source = tmp_path / "source.parquet"
    report = rephrase_file(tmp_path / "m", source, target, Rewriting(refused="keep_original"), Engines())
    assert (report.written, report.left_out) == (5, ["fake/40"])
    assert [row.uid for row in read_rows(target)] == [row.uid for row in rows]
    origins = pq.read_table(target)["rephrase"].to_pylist()
    assert [origin["kept_original"] for origin in origins] == [False] * 4 + [True, False]
    assert (origins[4]["attempt"], origins[4]["checks"]) == (None, None)
    assert read_rows(target)[4] == rows[4]
    problems = load_problems([source], [target], Words(), system_prompt=None, max_prompt_tokens=10**6)
    assert len(problems) == 6


@pytest.mark.usefixtures("no_engines")
def test_the_other_columns_of_the_source_stay_with_text_for_indices_too(rows: list[Row], tmp_path: Path) -> None:
    source, target = tmp_path / "named.parquet", tmp_path / "out.parquet"
    records = [
        {
            "data_source": "dapo",
            "prompt": [{"role": "system", "content": "Think."}, *row.messages],
            "ability": "algebra",
            "reward_model": {"ground_truth": row.ground_truth, "style": "rule"},
            "extra_info": {"index": f"id-{row.index}", "split": "test", "level": 3},
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(records), source)
    rephrase_file(tmp_path / "m", source, target, Rewriting(), Engines())
    written = pq.read_table(target).to_pylist()
    assert [row["extra_info"] for row in written] == [r["extra_info"] for i, r in enumerate(records) if i != 4]
    assert (written[0]["ability"], written[0]["prompt"][0]["content"]) == ("algebra", "Think.")
    assert "owl" in written[0]["prompt"][1]["content"]
    assert pq.read_table(tmp_path / "out.originals.parquet").to_pylist() == [r for i, r in enumerate(records) if i != 4]


def test_a_folder_without_a_model_is_named_before_anything_starts(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing-here: no such directory"):
        rephrase_file(
            tmp_path / "nothing-here", tmp_path / "source.parquet", tmp_path / "o.parquet", Rewriting(), Engines()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.parquet"]


@pytest.mark.parametrize(
    "setting",
    [
        *({"attempts": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}, {"solver_samples": -1}),
        *({"solver_max_tokens": 0}, {"batch_rows": 0}, {"refused": "drop"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(InputError, match=f"{name}: found"):
        Rewriting(**setting)


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_nonsense_of_an_untrained_model_is_refused_and_reported(tmp_path: Path, rows: list[Row]) -> None:
    from megatron_coreward.cluster.ray_start import stop_ray
    from megatron_coreward.demo.model import write_model
    from megatron_coreward.demo.tokenizer import byte_level_tokenizer

    model = write_model(tmp_path / "model", byte_level_tokenizer(), layers=2, hidden=64, ffn=96, head_dim=32)
    target = tmp_path / "out.parquet"
    settings = Rewriting(attempts=2, max_tokens=16)
    try:
        report = rephrase_file(
            model,
            tmp_path / "source.parquet",
            target,
            settings,
            Engines(kv_cache_gib=0.125, max_num_seqs=16),
            dtype="float32",
        )
    finally:
        stop_ray()
    assert (report.rows, report.written, report.replies) == (6, 0, 12)
    assert sum(report.refused_replies.values()) == 12
    assert not target.exists()
    assert "0 of 6 questions" in (tmp_path / "out.report.html").read_text()
