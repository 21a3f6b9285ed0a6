"""An evaluation samples each question once, survives kills, judges what was sampled, and says what it measured."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.task import make_splits, write_parquet
from megatron_coreward.demo.tokenizer import word_level_tokenizer
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation import evaluate
from megatron_coreward.evaluation.evaluate import (
    Engines,
    GradingSettings,
    Sampling,
    compare_files,
    evaluate_files,
    hf_model_dir,
    model_fingerprint,
)
from megatron_coreward.evaluation.results import EvaluationResult, read_result
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.types import Completion

SAMPLING = Sampling(n=4, max_tokens=24, dtype="float32", seed=3)
ENGINES = Engines(batch_questions=5, kv_cache_gib=0.125, max_num_seqs=64, gpu_memory_utilization=0.3)
GRADING = GradingSettings(equivalence="exact")
QUESTIONS = 12


class Killed(Exception):
    pass


class FakeEngines:
    """Sample i of a request answers seed + i modulo 3 as the gold answers do not: 1 is right for every question."""

    def __init__(self, batches_until_killed: int | None = None) -> None:
        self.asked: list[SamplingRequest] = []
        self.calls = 0
        self._left = batches_until_killed

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        if self._left is not None and self.calls == 2 * self._left:  # sampled and greedy: two calls a batch
            raise Killed
        self.calls += 1
        self.asked.extend(requests)
        return [[self._sample(r.seed + i) for i in range(r.n)] for r in requests]

    @staticmethod
    def _sample(seed: int) -> Completion:
        ids = np.zeros(3, dtype=np.int32)
        return Completion(ids, np.zeros(3, dtype=np.float32), rf"so \boxed{{{seed % 3}}}", None, "stop", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"layers": 1, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 64}
    return write_model(tmp_path_factory.mktemp("evaluation") / "model", word_level_tokenizer(), **sizes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources; the right answer to every question is 1."""
    folder = tmp_path_factory.mktemp("questions")
    written = write_parquet(folder, make_splits(5, 0, QUESTIONS, 0))
    table = [
        Row((Message(role="user", content=f"Tom has {i} apples. How many now?"),), "1", f"set-{i % 2}", i)
        for i in range(QUESTIONS)
    ]
    write_rows(written.heldout, table, split="test")
    return [written.heldout]


def run(
    monkeypatch: pytest.MonkeyPatch, fake: FakeEngines, model: Path, files: list[Path], out: Path, **changes: Any
) -> EvaluationResult:
    @contextmanager
    def running(*_: Any) -> Iterator[FakeEngines]:
        yield fake

    monkeypatch.setattr(evaluate, "running_engines", running)
    arguments = {"sampling": SAMPLING, "grading": GRADING, "engines": ENGINES, "system_prompt": None} | changes
    return evaluate_files(model, files, out, **arguments)


def test_the_result_says_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    fake = FakeEngines()
    progress: list[tuple[int, int]] = []
    result = run(
        monkeypatch, fake, model, files, tmp_path, on_progress=lambda done, total: progress.append((done, total))
    )
    assert progress == [(0, 12), (5, 12), (10, 12), (12, 12)]
    assert {(r.n, r.temperature, r.max_tokens) for r in fake.asked} == {(4, 1.0, 24), (1, 0.0, 24)}
    right = np.array([question.right for question in result.questions])
    metrics = result.metrics()
    assert metrics["avg@4"].value == right.mean()
    assert metrics["avg@4"].low < metrics["avg@4"].value < metrics["avg@4"].high
    assert metrics["pass@4"].value == right.any(axis=1).mean() == 1  # of four in a row, one is 1 modulo 3
    assert metrics["pass@1"].value == np.mean([question.greedy == "1" for question in result.questions])
    assert result.sources == ["set-0", "set-1"]

    content = json.loads((tmp_path / "result.json").read_text())
    assert content["metrics"]["avg@4"]["value"] == right.mean()
    assert set(content["by_source"]) == {"set-0", "set-1"}
    assert read_result(tmp_path).metrics() == metrics
    page = (tmp_path / "page.html").read_text()
    assert "set-1" in page
    assert "http" not in page  # self-contained
    assert "<script" not in page


def test_a_result_that_was_written_under_the_former_key_is_read(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    result = run(monkeypatch, FakeEngines(), model, files, tmp_path)
    content = json.loads((tmp_path / "result.json").read_text())
    content["judging"] = content.pop("grading")
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert dict(read_result(tmp_path).grading) == json.loads(json.dumps(dict(result.grading)))
    del content["judging"]
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a result of an evaluation"):
        read_result(tmp_path)


def test_a_killed_evaluation_goes_on_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    whole = run(monkeypatch, FakeEngines(), model, files, tmp_path / "whole")
    killed, resumed = FakeEngines(batches_until_killed=1), FakeEngines()
    with pytest.raises(Killed):
        run(monkeypatch, killed, model, files, tmp_path / "cut")
    job_log = tmp_path / "cut" / "samples.jsonl"
    with job_log.open("ab") as file:
        file.write(b'{"key": "set-1/5", "it')  # and the machine went down within a line
    result = run(monkeypatch, resumed, model, files, tmp_path / "cut")
    assert [len(fake.asked) for fake in (killed, resumed)] == [2 * 5, 2 * 7]
    assert not {r.seed for r in killed.asked} & {r.seed for r in resumed.asked}
    assert result.questions == whole.questions

    third = FakeEngines()
    assert run(monkeypatch, third, model, files, tmp_path / "cut").questions == whole.questions
    assert third.calls == 0


def test_batches_do_not_change_what_is_drawn(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    results = [
        run(
            monkeypatch,
            FakeEngines(),
            model,
            files,
            tmp_path / str(size),
            engines=replace(ENGINES, batch_questions=size),
        )
        for size in (1, 100)
    ]
    assert results[0].questions == results[1].questions


def test_other_sampling_data_or_weights_do_not_go_on_from_a_log(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    run(monkeypatch, FakeEngines(), model, files, tmp_path)
    with pytest.raises(InputError, match="sampling: found .*'seed': 3.*now .*'seed': 4"):
        run(monkeypatch, FakeEngines(), model, files, tmp_path, sampling=replace(SAMPLING, seed=4))
    with pytest.raises(InputError, match="data: found"):
        run(monkeypatch, FakeEngines(), model, files, tmp_path, max_problems=3)
    other = write_model(tmp_path / "other", word_level_tokenizer(), seed=9, layers=1, hidden=64, ffn=64)
    with pytest.raises(InputError, match="model: found"):
        run(monkeypatch, FakeEngines(), other, files, tmp_path)


def test_grading_again_samples_nothing(
    monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path
) -> None:
    run(monkeypatch, FakeEngines(), model, files, tmp_path)
    fake = FakeEngines()
    result = run(
        monkeypatch, fake, model, files, tmp_path, grading=GradingSettings("exact", answer_formats=("hashes",))
    )
    assert fake.calls == 0
    assert result.no_answer_share == 1
    assert result.metrics()["avg@4"].value == 0


def test_questions_without_an_answer_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "open.parquet"
    write_rows(file, [Row((Message(role="user", content="Why?"),), None, "open", 0)], split="test")
    fake = FakeEngines()
    with pytest.raises(InputError, match="1 of 1 questions have no"):
        run(monkeypatch, fake, model, [file], tmp_path / "out")
    assert fake.calls == 0


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.5), ("max_tokens", 0)]
)
def test_bad_sampling_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field}: found {value}"):
        replace(SAMPLING, **{field: value})


class TestModelDirectories:
    def test_a_hugging_face_directory_is_itself(self, model: Path) -> None:
        with hf_model_dir(model) as path:
            assert path == model.resolve()

    def test_another_directory_is_converted_into_one_that_goes(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "checkpoint").mkdir()
        calls = []

        def convert(source: Path, target: Path) -> None:
            calls.append(source)
            for file in model.iterdir():
                (target / file.name).write_bytes(file.read_bytes())

        with hf_model_dir(tmp_path / "checkpoint", convert) as path:
            assert model_fingerprint(path) == model_fingerprint(model)
        assert calls == [(tmp_path / "checkpoint").resolve()]
        assert not path.exists()

    def test_what_is_neither_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no config.json"), hf_model_dir(tmp_path):
            pass
        with pytest.raises(InputError, match="no such directory"), hf_model_dir(tmp_path / "gone"):
            pass

    def test_a_fingerprint_depends_on_the_weights_and_not_on_the_place(self, model: Path, tmp_path: Path) -> None:
        for name in ("same", "other"):
            (tmp_path / name).mkdir()
            for file in model.iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        weights = tmp_path / "other" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert model_fingerprint(tmp_path / "same") == model_fingerprint(model)
        assert model_fingerprint(tmp_path / "other") != model_fingerprint(model)


class TestComparison:
    @pytest.fixture
    def folders(self, monkeypatch: pytest.MonkeyPatch, model: Path, files: list[Path], tmp_path: Path) -> list[Path]:
        for seed in (3, 4):
            sampling = replace(SAMPLING, seed=seed)
            run(monkeypatch, FakeEngines(), model, files, tmp_path / str(seed), sampling=sampling, name=f"model {seed}")
        return [tmp_path / "3", tmp_path / "4"]

    def test_pairs_questions_and_leaves_a_page(self, folders: list[Path], tmp_path: Path) -> None:
        a, b = (read_result(folder).scores()["avg@4"] for folder in folders)
        comparison = compare_files(*folders, out=tmp_path / "out")
        first, second, pair = comparison.metrics["avg@4"]
        assert (first, second) == (a.mean(), b.mean())
        assert pair.difference.value == pytest.approx((b - a).mean())
        assert pair.num_questions == QUESTIONS
        assert comparison.differing_settings == {"seed": (3, 4)}
        assert json.loads((tmp_path / "out" / "comparison.json").read_text())["metrics"]["avg@4"]["b"] == b.mean()
        assert "model 4" in (tmp_path / "out" / "comparison.html").read_text()

    def test_a_result_against_itself_is_no_difference(self, folders: list[Path]) -> None:
        for _, _, pair in compare_files(folders[0], folders[0]).metrics.values():
            assert (pair.difference.value, pair.p_value) == (0, 1)

    def test_only_shared_questions_count(self, folders: list[Path]) -> None:
        file = folders[0] / "result.json"
        content = json.loads(file.read_text())
        content["questions"] = content["questions"][2:]
        file.write_text(json.dumps(content))
        comparison = compare_files(*folders)
        assert comparison.num_only_one == 2
        assert comparison.metrics["avg@4"][2].num_questions == QUESTIONS - 2

    def test_results_of_other_questions_are_refused(self, folders: list[Path], tmp_path: Path) -> None:
        file = folders[0] / "result.json"
        text = file.read_text()
        file.write_text(text.replace('"ground_truth": "1"', '"ground_truth": "2"'))
        with pytest.raises(InputError, match="'2' in one result and '1' in the other"):
            compare_files(*folders)
        file.write_text(text.replace('"uid": "set', '"uid": "test'))
        with pytest.raises(InputError, match="no question in common"):
            compare_files(*folders)
        for bad in (tmp_path / "nothing", tmp_path):
            with pytest.raises(InputError, match="no result of an evaluation"):
                compare_files(bad, folders[1])
        file.write_text("{}")
        with pytest.raises(InputError, match="not a result of an evaluation"):
            compare_files(*folders)


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_model_is_evaluated_with_its_own_weights_through_vllm(model: Path, files: list[Path], tmp_path: Path) -> None:
    """The greedy answer of the engine is the one that transformers finds, from the same directory."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_coreward.cluster.ray_start import stop_ray

    try:
        result = evaluate_files(model, files, tmp_path, SAMPLING, GRADING, ENGINES, system_prompt=None)
    finally:
        stop_ray()
    assert len(result.questions) == QUESTIONS
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()[1:]]
    texts = {row["key"]: row["item"]["greedy"]["text"] for row in rows}
    tokenizer = word_level_tokenizer()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for question in result.questions[:3]:
        prompt = torch.tensor([tokenizer(question.question, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            ids = reference.generate(prompt, max_new_tokens=SAMPLING.max_tokens, do_sample=False)[0, prompt.shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == texts[question.uid]
    samples = [sample["text"] for row in rows for sample in row["item"]["samples"]]
    assert len(samples) == QUESTIONS * SAMPLING.n
    assert len(set(samples)) > QUESTIONS
