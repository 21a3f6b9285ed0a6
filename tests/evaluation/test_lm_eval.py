"""lm-evaluation-harness over our engines: its tasks, its scores, our samples."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.evaluation import lm_eval, lm_eval_job
from megatron_coreward.evaluation.benchmarks import BENCHMARKS, HarnessBenchmark, missing
from megatron_coreward.evaluation.evaluate import Engines
from megatron_coreward.evaluation.lm_eval import run_lm_eval
from megatron_coreward.rollout.requests import SamplingRequest
from megatron_coreward.types import Completion
from tests.evaluation.test_tasks import SUM, fenced

ENGINES = Engines(batch_questions=4, kv_cache_gib=0.125, max_num_seqs=16, gpu_memory_utilization=0.3)
TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: {output_type}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: {metric}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval") / "model"
    return write_model(folder, byte_level_tokenizer(), layers=1, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=64)


def write_task(
    folder: Path, rows: Sequence[dict[str, str]], output_type: str = "generate_until", metric: str = "exact_match"
) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(TASK.format(file=folder / "rows.jsonl", output_type=output_type, metric=metric))
    return folder


class FakeEngines:
    """Answers a prompt with what `answer` says for its text and the number of the sample."""

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        self.asked: list[SamplingRequest] = []
        self.lengths: list[int] = []
        self._answer, self._tokenizer = answer, byte_level_tokenizer()

    @contextmanager
    def running(self, hf_path: Path, engines: Engines, sampling: Any, max_model_len: int, logs: Path) -> Iterator[Any]:
        self.lengths.append(max_model_len)
        yield self

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Completion]]:
        self.asked.extend(requests)
        empty = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
        return [
            [Completion(*empty, self._answer(self._tokenizer.decode(r.prompt), i), None, "stop", 0) for i in range(r.n)]
            for r in requests
        ]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run_lm_eval` in this process, over fake engines."""

    def run(fake: FakeEngines, benchmarks: Sequence[str], **options: Any) -> dict[str, Any]:
        class Finished:
            returncode = 0

        def inside(command: list[str], **_: Any) -> Finished:
            lm_eval_job.main(Path(command[-1]))
            return Finished()

        monkeypatch.setattr(lm_eval_job, "running_engines", fake.running)
        monkeypatch.setattr(lm_eval.subprocess, "run", inside)
        out = options.pop("out", tmp_path / "out")
        return run_lm_eval(model, benchmarks, out, ENGINES, **{"data": tmp_path / "data", **options})

    return run


ROWS = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(9)]


def adds(prompt: str, sample: int) -> str:
    """Right for even numbers."""
    digit = int(prompt.rpartition("user\n")[2][0]) if "user\n" in prompt else int(prompt[0])
    return f"{digit + 1 + digit % 2}\n then nonsense"


class TestTasksOfOnesOwn:
    @pytest.mark.long
    def test_scores_and_settings_are_the_task_s(self, measure: Any, tmp_path: Path) -> None:
        fake = FakeEngines(adds)
        found = measure(fake, ["tiny_sums"], include_path=write_task(tmp_path / "t", ROWS), temperature=None)
        result = found["tiny_sums"]
        assert result["value"] == pytest.approx(5 / 9)
        assert result["low"] < result["value"] < result["high"]
        assert (result["metric"], result["num_questions"]) == ("exact_match", 9)
        assert result["metrics"]["tiny_sums"]["exact_match,none"] == pytest.approx(5 / 9)
        assert {(r.temperature, r.max_tokens, r.n, *r.stop) for r in fake.asked} == {(0.0, 12, 1, "\n")}
        assert byte_level_tokenizer().decode(fake.asked[0].prompt) == (
            "<|im_start|>user\n0+1=<|im_end|>\n<|im_start|>assistant\n"
        )
        assert fake.lengths == [len(fake.asked[0].prompt) + 12]

    @pytest.mark.long
    def test_the_paper_s_temperature_replaces_the_task_s(self, measure: Any, tmp_path: Path) -> None:
        fake = FakeEngines(adds)
        task = write_task(tmp_path / "t", ROWS)
        measure(fake, ["tiny_sums"], include_path=task, max_tokens=5, top_p=0.9, chat_template=False, limit=3)
        assert {(r.temperature, r.top_p, r.max_tokens) for r in fake.asked} == {(0.8, 0.9, 5)}
        assert [byte_level_tokenizer().decode(r.prompt) for r in fake.asked] == ["0+1=", "1+1=", "2+1="]
        assert len({r.seed for r in fake.asked}) == 3

    @pytest.mark.long
    def test_what_was_sampled_is_not_sampled_again(self, measure: Any, tmp_path: Path) -> None:
        task = write_task(tmp_path / "t", ROWS)
        first = FakeEngines(adds)
        whole = measure(first, ["tiny_sums"], include_path=task)
        log = tmp_path / "out" / "samples.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:6]))  # killed after five
        second, third = FakeEngines(adds), FakeEngines(adds)
        assert measure(second, ["tiny_sums"], include_path=task) == whole
        assert len(second.asked) == 4
        assert measure(third, ["tiny_sums"], include_path=task) == whole
        assert third.lengths == []
        with pytest.raises(InputError, match="generation: found"):
            measure(third, ["tiny_sums"], include_path=task, seed=5)

    def test_repeated_requests_get_samples_of_their_own(self, measure: Any, tmp_path: Path) -> None:
        task = write_task(tmp_path / "t", ROWS[:1])
        with (task / "tiny.yaml").open("a") as file:
            file.write("repeats: 3\nfilter_list:\n  - name: vote\n    filter:\n      - function: majority_vote\n")
            file.write("      - function: take_first\n")
        fake = FakeEngines(lambda prompt, sample: "0" if sample == 0 else "1")
        found = measure(fake, ["tiny_sums"], include_path=task)
        assert [r.n for r in fake.asked] == [3]
        assert found["tiny_sums"]["value"] == 1  # two of three

    def test_a_greedy_request_that_comes_twice_is_sampled_once(self, measure: Any, tmp_path: Path) -> None:
        task = write_task(tmp_path / "t", [ROWS[0], ROWS[1], ROWS[0]])
        fake = FakeEngines(adds)
        found = measure(fake, ["tiny_sums"], include_path=task, temperature=0.0)
        assert [(r.n, r.temperature) for r in fake.asked] == [(1, 0.0), (1, 0.0)]  # vLLM refuses n > 1 of greedy ones
        assert found["tiny_sums"]["value"] == pytest.approx(2 / 3)

    def test_log_likelihoods_are_refused_before_an_engine_starts(self, measure: Any, tmp_path: Path) -> None:
        fake = FakeEngines(adds)
        task = write_task(tmp_path / "t", ROWS, "loglikelihood", "acc")
        with pytest.raises(InputError, match="task tiny_sums: its output_type is loglikelihood.*allowed: tasks with"):
            measure(fake, ["tiny_sums"], include_path=task)
        assert fake.lengths == []

    def test_prompts_that_do_not_fit_are_refused(self, measure: Any, tmp_path: Path) -> None:
        fake = FakeEngines(adds)
        task = write_task(tmp_path / "t", ROWS)
        with pytest.raises(InputError, match="task tiny_sums: a prompt of 4 tokens; allowed: 1 to 3"):
            measure(fake, ["tiny_sums"], include_path=task, chat_template=False, max_model_len=4)
        measure(fake, ["tiny_sums"], include_path=task, chat_template=False, max_model_len=9, out=tmp_path / "short")
        assert {r.max_tokens for r in fake.asked} == {5}


class TestThePaperS:
    @pytest.mark.slow
    def test_mmlu_pro_takes_its_local_copy(self, measure: Any, tmp_path: Path) -> None:
        categories = "biology business chemistry economics engineering health history law math other philosophy"
        names = [*categories.split(), "physics", "psychology", "computer science"]
        folder = tmp_path / "data" / "mmlu_pro" / "data"
        folder.mkdir(parents=True)
        for split, count in (("test", 2), ("validation", 5)):
            rows = [
                {
                    "question": f"{split} {i} of {name}?",
                    "options": ["yes", "no"],
                    "answer": "AB"[i % 2],
                    "cot_content": "A: Let's think step by step. The answer is (A).",
                    "category": name,
                }
                for name in names
                for i in range(count)
            ]
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
        found = measure(FakeEngines(lambda prompt, i: "So the answer is (B). Question: next?"), ["mmlu_pro"])
        assert found["mmlu_pro"]["value"] == 0.5
        assert found["mmlu_pro"]["num_questions"] == 28
        assert found["mmlu_pro"]["metrics"]["mmlu_pro"]["exact_match,custom-extract"] == 0.5

    def test_crux_is_one_number_of_both_directions(self, measure: Any, tmp_path: Path) -> None:
        folder = tmp_path / "data" / "cruxeval"
        folder.mkdir(parents=True)
        rows = [
            {"code": f"def f(x):\n    return x + {n}", "input": "1", "output": str(n + 1), "id": str(n)} for n in (1, 2)
        ]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fake = FakeEngines(lambda prompt, i: "Hm. [ANSWER]assert f(1) == 2[/ANSWER] Also this.")
        with pytest.raises(InputError, match="benchmark crux: it executes code.*--allow-code"):
            measure(fake, ["crux"])
        found = measure(fake, ["crux"], allow_code=True)["crux"]
        assert (found["value"], found["num_questions"]) == (0.75, 4)  # both inputs, one output
        assert found["metrics"]["coreward_crux"]["acc,none"] == 0.75
        assert found["settings"]["isolation"] in ("namespaces", "limits")

    def test_livecodebench_runs_the_programs(self, measure: Any, tmp_path: Path) -> None:
        folder = tmp_path / "data" / "livecodebench"
        folder.mkdir(parents=True)
        for n in (1, 2):
            row = SUM | {"question_id": f"q{n}", "question_content": f"Problem {n}."}
            (folder / f"test{n}.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "code_generation_lite.py").write_text("raise SystemExit('a loading script ran')")
        right = fenced("print(sum(map(float, input().split())))")
        fake = FakeEngines(lambda prompt, i: right if "Problem 1" in prompt else fenced("print(0)"))
        found = measure(fake, ["livecodebench"], allow_code=True)["livecodebench"]
        assert (found["value"], found["num_questions"]) == (0.5, 2)

    @pytest.mark.parametrize("name", [n for n, b in BENCHMARKS.items() if isinstance(b, HarnessBenchmark)])
    def test_what_is_not_there_is_said_with_how_to_get_it(self, name: str, model: Path, tmp_path: Path) -> None:
        reason = missing(name, tmp_path, allow_code=True)
        assert reason is not None
        assert "get it: hf download --repo-type dataset" in reason
        with pytest.raises(InputError, match=f"benchmark {name}: no .*get it: hf download"):
            run_lm_eval(model, [name], tmp_path / "out", ENGINES, data=tmp_path)
        assert not (tmp_path / "out").exists()

    def test_ifeval_is_the_mean_of_four_accuracies(self) -> None:
        """Two prompts with one and three instructions: two of four instructions are followed, one prompt of two."""
        strict, loose = [1.0, 0.0], [1.0, 1.0]
        scores = lm_eval_job.mean_scores([strict, loose, [[True], [False, True, False]], [[True], [True, True, True]]])
        assert sum(scores) / 2 == pytest.approx((0.5 + 1.0 + 0.5 + 1.0) / 4)

    def test_ifeval_says_that_nltk_lacks_its_sentences(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import nltk

        (tmp_path / "ifeval").mkdir()
        (tmp_path / "ifeval" / "ifeval_input_data.jsonl").write_text("{}\n")
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
        assert missing("ifeval", tmp_path, allow_code=False) == (
            "nltk has no tokenizers/punkt_tab; get it: python -m nltk.downloader punkt_tab"
        )


def test_other_tools_are_named_for_mathematics(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="benchmark math500: `evaluate run` measures it"):
        run_lm_eval(model, ["math500"], tmp_path, ENGINES, data=tmp_path)


def test_a_missing_harness_is_named_with_its_installation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed, which measures ifeval; install it: pip install"):
        run_lm_eval(model, ["ifeval"], tmp_path, ENGINES, data=tmp_path)


def test_a_harness_that_dies_is_a_failed_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        returncode = -9

    monkeypatch.setattr(lm_eval.subprocess, "run", lambda command, **_: Dead())
    with pytest.raises(RunError, match="exit status -9 and left no"):
        run_lm_eval(model, ["tiny_sums"], tmp_path / "out", ENGINES, data=tmp_path)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_tiny_model_is_measured_through_vllm(model: Path, tmp_path: Path) -> None:
    """The harness's own process, our engines, a local task: the greedy texts are those that transformers finds."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = byte_level_tokenizer()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = []
    for n in range(4):
        prompt = torch.tensor([tokenizer(f"<|im_start|>user\n{n}+1=<|im_end|>\n<|im_start|>assistant\n")["input_ids"]])
        with torch.no_grad():
            ids = reference.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0]
        rows.append({"question": f"{n}+1=", "answer": text if n else f"not {text}"})
    task = write_task(tmp_path / "t", rows)
    options: dict[str, Any] = {"data": tmp_path, "dtype": "float32", "include_path": task}
    greedy = run_lm_eval(model, ["tiny_sums"], tmp_path / "greedy", ENGINES, temperature=None, **options)
    assert greedy["tiny_sums"]["value"] == 0.75
    assert greedy["tiny_sums"]["num_questions"] == 4
    with pytest.raises(InputError, match="'nonsense': unknown; allowed: livecodebench, crux"):
        run_lm_eval(model, ["nonsense"], tmp_path / "other", ENGINES, **options)
