"""Rephrasing a file: nothing is lost or asked twice, whatever happens, and only what passes is written."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.data.dataset import load_problems
from megatron_coreward.data.parquet import Message, Row, read_rows, write_rows
from megatron_coreward.errors import InputError
from megatron_coreward.rewards.equivalence import Judge
from megatron_coreward.rollout.engine import Sample, SamplingRequest
from megatron_coreward.telemetry.journal import Journal
from megatron_coreward.trainer import rephrase as module
from megatron_coreward.trainer.evaluation import Engines
from megatron_coreward.trainer.rephrase import Job, Rewriting, rephrase_file

QUESTIONS = [f"A baker sells {7 + i} loaves a day for {20 + i} days. How many loaves is that?" for i in range(6)]


def good(i: int) -> str:
    return (
        f"<rewritten>Over {20 + i} nights an owl catches {7 + i} mice each night; find the total of mice.</rewritten>"
    )


class Words:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


class FakeEngines:
    """Replies by the number of the question; `replies[i]` are those of its attempts."""

    def __init__(self, replies: dict[int, list[str]], dies_after: int = 10**9) -> None:
        self.replies, self.left = replies, dies_after
        self.asked: list[tuple[int, int]] = []  # (question, seed)

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Sample]]:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        answers = []
        for request in requests:
            text = "".join(map(chr, request.prompt))
            number = next((i for i, q in enumerate(QUESTIONS) if q in text), None)
            if number is None or request.n > 1:  # the solver's turn
                other = "owl" in text and "25 nights" in text
                answers.append([self._sample("\\boxed{1}" if other else "\\boxed{2}")] * request.n)
                continue
            earlier = sum(asked == number for asked, _ in self.asked)
            self.asked.append((number, request.seed))
            answers.append([self._sample(self.replies[number][min(earlier, len(self.replies[number]) - 1)])])
        return answers

    @staticmethod
    def _sample(text: str) -> Sample:
        return Sample(np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", 0)


ALL_GOOD = {i: [good(i)] for i in range(6)}


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    write_rows(
        tmp_path / "source.parquet",
        [Row((Message(role="user", content=q),), str(i), "fake", 10 * i) for i, q in enumerate(QUESTIONS)],
        split="train",
    )
    return read_rows(tmp_path / "source.parquet")


def job(rows: list[Row], folder: Path, engines: FakeEngines, **settings: Any) -> Iterator[Job]:
    with Journal(folder / "journal.jsonl", {"job": 1}) as journal, Judge("exact") as judge:
        made = Job(rows, journal, Words(), Rewriting(batch_rows=2, **settings), judge, None)
        made.run(engines, lambda done, total: None)
        yield made


def test_what_was_refused_is_asked_again_with_another_seed(rows: list[Row], tmp_path: Path) -> None:
    engines = FakeEngines(
        ALL_GOOD | {1: ["no tags", good(1)], 4: ["no tags"], 5: [f"<rewritten>{QUESTIONS[5]}</rewritten>"]}
    )
    (done,) = job(rows, tmp_path, engines)
    report = done.report()
    assert (report.rows, report.written, report.replies) == (6, 4, 3 + 2 + 3 + 3)
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


@pytest.fixture
def no_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    replies = ALL_GOOD | {4: ["no tags <b>&</b>"]}
    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", lambda path: Words())
    monkeypatch.setattr(module, "model_fingerprint", lambda path: "fake")
    monkeypatch.setattr(module, "running_engines", lambda *args: nullcontext(FakeEngines(replies)))


@pytest.mark.usefixtures("no_engines")
def test_the_files_pair_and_carry_where_each_row_came_from(rows: list[Row], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

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
    assert set(json.loads(row["verdicts"]).values()) == {True}
    page = (tmp_path / "rewritten.report.html").read_text()
    assert "5 of 6 questions" in page
    assert json.loads((tmp_path / "rewritten.report.json").read_text())["written"] == 5


@pytest.mark.usefixtures("no_engines")
def test_another_job_does_not_mix_with_the_journal(rows: list[Row], tmp_path: Path) -> None:
    arguments = (tmp_path / "m", tmp_path / "source.parquet", tmp_path / "out.parquet")
    rephrase_file(*arguments, Rewriting(), Engines())
    with pytest.raises(InputError, match="a journal of other work"):
        rephrase_file(*arguments, Rewriting(temperature=0.9), Engines())


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_nonsense_of_an_untrained_model_is_refused_and_reported(tmp_path: Path, rows: list[Row]) -> None:
    from megatron_coreward.demo.model import write_model
    from megatron_coreward.demo.tokenizer import byte_level_tokenizer
    from megatron_coreward.trainer.cluster import stop_ray

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
