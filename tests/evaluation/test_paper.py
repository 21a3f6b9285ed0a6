"""The paper's evaluation measures what is there, says what is not, and its results make the paper's table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_coreward.algorithms.accuracy import Estimate
from megatron_coreward.config.paper import paper_runs
from megatron_coreward.data.parquet import Message, Row, write_rows
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.evaluation import paper
from megatron_coreward.evaluation.benchmarks import BENCHMARKS, MathBenchmark
from megatron_coreward.evaluation.evaluate import Engines, Sampling
from megatron_coreward.evaluation.paper import (
    Measured,
    ModelLabels,
    PaperResult,
    PaperSettings,
    evaluate_paper,
    model_labels,
    read_paper_result,
    write_paper_result,
)
from megatron_coreward.evaluation.paper_table import NUMBERS, csv_text, latex, markdown, read_numbers, write_tables
from tests.evaluation.test_evaluate import FakeEngines, model  # noqa: F401  (a fixture)

LABELS = ModelLabels("Qwen3-8B-Base", "dapo", "co_rewarding_ii")
SETTINGS = PaperSettings(max_tokens=24)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two of the three mathematical sets; the answer to every question is 1."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [Row((Message(role="user", content=f"{i}?"),), "1", "set", i) for i in range(6)]
    for name in ("math500", "amc"):
        benchmark = BENCHMARKS[name]
        assert isinstance(benchmark, MathBenchmark)
        (folder / benchmark.file).parent.mkdir()
        write_rows(folder / benchmark.file, rows, split="test")
    return folder


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """Evaluations over fake engines; the sampling of each."""
    from contextlib import contextmanager

    from megatron_coreward.evaluation import evaluate

    asked: list[Sampling] = []

    @contextmanager
    def running(hf_path: Path, engines: Engines, sampling: Sampling, *_: Any) -> Any:
        asked.append(sampling)
        yield FakeEngines()

    monkeypatch.setattr(evaluate, "running_engines", running)
    return asked


class TestEvaluation:
    def test_what_is_there_is_measured_and_the_rest_is_named(
        self,
        model: Path,  # noqa: F811
        data: Path,
        sampled: list[Sampling],
        tmp_path: Path,
    ) -> None:
        result = evaluate_paper(model, tmp_path / "out", Engines(), data=data, labels=LABELS, settings=SETTINGS)
        assert list(result.measured) == ["math500", "amc"]
        assert [(s.n, s.temperature, s.greedy, s.max_tokens) for s in sampled] == [
            (1, 0.8, False, 24),
            (8, 0.8, False, 24),
        ]
        assert result.measured["math500"].metric == "avg@1"
        amc = result.measured["amc"]
        assert (amc.metric, amc.num_questions) == ("avg@8", 6)
        assert 0 < amc.estimate.low <= amc.estimate.value <= amc.estimate.high < 1
        assert result.not_measured["gsm8k"].startswith(
            f"no {data}/gsm8k/test.parquet; get it: megatron-coreward prepare-data"
        )
        assert set(result.not_measured) == set(BENCHMARKS) - {"math500", "amc"}
        assert read_paper_result(tmp_path / "out") == result
        evaluate_paper(model, tmp_path / "out", Engines(), data=data, labels=LABELS, settings=SETTINGS)
        assert len(sampled) == 2  # nothing is sampled again

    def test_benchmarks_that_are_measured_one_by_one_stand_in_one_result(
        self,
        model: Path,  # noqa: F811
        data: Path,
        sampled: list[Sampling],
        tmp_path: Path,
    ) -> None:
        def evaluate(name: str, settings: PaperSettings = SETTINGS, labels: ModelLabels = LABELS) -> PaperResult:
            return evaluate_paper(
                model, tmp_path / "out", Engines(), data=data, labels=labels, settings=settings, benchmarks=[name]
            )

        amc = evaluate("amc").measured["amc"]
        both = evaluate("math500")
        assert list(both.measured) == ["math500", "amc"]
        assert both.measured["amc"] == amc
        assert read_paper_result(tmp_path / "out") == both
        with pytest.raises(InputError, match=r"another evaluation \(seed: 0, and 1 now\)"):
            evaluate("amc", settings=PaperSettings(max_tokens=24, seed=1))
        with pytest.raises(InputError, match="another evaluation .*model: co_rewarding_ii, and entropy now"):
            evaluate("amc", labels=ModelLabels("Qwen3-8B-Base", "dapo", "entropy"))
        assert len(sampled) == 2

    def test_what_was_measured_is_written_before_the_harness_fails(
        self,
        model: Path,  # noqa: F811
        data: Path,
        sampled: list[Sampling],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (data / "cruxeval").mkdir()
        (data / "cruxeval" / "test.jsonl").write_text("{}\n")

        def fail(*_: Any, **__: Any) -> dict[str, Any]:
            raise RunError("the harness has ended")

        monkeypatch.setattr(paper, "run_lm_eval", fail)
        with pytest.raises(RunError):
            evaluate_paper(
                model, tmp_path / "out", Engines(), data=data, labels=LABELS, settings=SETTINGS, allow_code=True
            )
        assert list(read_paper_result(tmp_path / "out").measured) == ["math500", "amc"]

    def test_the_harness_measures_the_others(
        self,
        model: Path,  # noqa: F811
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (data / "cruxeval").mkdir()
        (data / "cruxeval" / "test.jsonl").write_text("{}\n")
        calls: list[tuple[Sequence[str], dict[str, Any]]] = []

        def measure(hf_path: Path, names: Sequence[str], out: Path, engines: Engines, **options: Any) -> dict[str, Any]:
            calls.append((names, options))
            return {"crux": {"metric": "acc", "value": 0.5, "low": 0.4, "high": 0.6, "num_questions": 9}}

        monkeypatch.setattr(paper, "run_lm_eval", measure)
        only = ["crux", "ifeval"]
        with pytest.raises(InputError, match="no benchmark can run:\n  crux: it executes code.*\n  ifeval: no "):
            evaluate_paper(
                model, tmp_path / "out", Engines(), data=data, labels=LABELS, settings=SETTINGS, benchmarks=only
            )
        result = evaluate_paper(
            model,
            tmp_path / "out",
            Engines(),
            data=data,
            labels=LABELS,
            settings=SETTINGS,
            benchmarks=only,
            allow_code=True,
        )
        ((names, options),) = calls
        assert names == ["crux"]
        assert options["allow_code"]
        assert (options["temperature"], options["max_tokens"], options["seed"]) == (0.8, 24, 0)
        assert result.measured["crux"] == Measured("acc", Estimate(0.5, 0.4, 0.6), 9)
        assert list(result.not_measured) == ["ifeval"]

    def test_unknown_benchmarks_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="benchmark 'aime': unknown; allowed: math500, gsm8k, amc"):
            evaluate_paper(
                tmp_path, tmp_path, Engines(), data=tmp_path, labels=LABELS, settings=SETTINGS, benchmarks=["aime"]
            )


class TestLabels:
    def test_a_model_in_a_run_is_what_its_config_says(self, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "x"
        for folder in ("hf", "checkpoints/step_000010"):
            (run / folder).mkdir(parents=True)
        tree = {
            "method": "co_rewarding_i",
            "model": {"hf_path": "models/Qwen2.5-3B"},
            "data": {"train_files": ["data/open-rs/train.parquet"]},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        expected = ModelLabels("Qwen2.5-3B", "open_rs", "co_rewarding_i")
        assert model_labels(run / "hf") == model_labels(run / "checkpoints" / "step_000010") == expected
        assert model_labels(run / "hf", data="math") == ModelLabels("Qwen2.5-3B", "math", "co_rewarding_i")

    def test_another_is_its_folder_untrained(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b" / "Qwen3-4B-Base"
        folder.mkdir(parents=True)
        assert model_labels(folder) == ModelLabels("Qwen3-4B-Base", "", "untrained")


def result(labels: ModelLabels, **percent: float) -> PaperResult:
    measured = {
        name: Measured("acc", Estimate(value / 100, value / 100 - 0.02, value / 100 + 0.02), 100)
        for name, value in percent.items()
    }
    return PaperResult(labels, measured, {}, {"temperature": 0.8})


class TestTable:
    RESULTS = (
        result(LABELS, gsm8k=93.25, ifeval=55.0),
        result(ModelLabels("Qwen3-8B-Base", "", "untrained"), gsm8k=30.0),
        result(ModelLabels("A_model", "math", "entropy"), gsm8k=40.0),
    )

    def test_rows_stand_beside_the_paper_s_in_its_order(self) -> None:
        lines = markdown(self.RESULTS, read_numbers()).splitlines()
        assert lines[0] == "| model | trained on | method | GSM8K | IFEval |"
        assert lines[2:7] == [
            "| A_model | MATH | Entropy | 40.00 (38.0 .. 42.0) |  |",
            "| Qwen3-8B-Base |  | before RL | 30.00 (28.0 .. 32.0) |  |",
            "|  |  | in the paper | 27.82 | 50.89 |",
            "| Qwen3-8B-Base | DAPO-14k | Co-rewarding-II | 93.25 (91.2 .. 95.2) | 55.00 (53.0 .. 57.0) |",
            "|  |  | in the paper | 94.01 | 53.31 |",
        ]
        assert "GSM8K: acc of 100 questions" in lines[-1]

    def test_every_number_is_in_the_csv(self) -> None:
        rows = list(csv.DictReader(io.StringIO(csv_text(self.RESULTS, read_numbers()))))
        assert [(row["method"], row["benchmark"], row["percent"], row["paper_percent"]) for row in rows] == [
            ("entropy", "gsm8k", "40.00", ""),
            ("untrained", "gsm8k", "30.00", "27.82"),
            ("co_rewarding_ii", "gsm8k", "93.25", "94.01"),
            ("co_rewarding_ii", "ifeval", "55.00", "53.31"),
        ]

    def test_the_paper_s_numbers_are_there_for_every_recipe_and_for_the_models_before_training(self) -> None:
        runs = {(run.model, run.data, run.method) for run in paper_runs()}
        before = {(name, "", "untrained") for name, _, _ in runs}
        numbers = read_numbers()
        assert set(numbers) == {
            (ModelLabels(*labels), benchmark) for labels in runs | before for benchmark in BENCHMARKS
        }
        # Averages that the text of the paper gives: of tables 1 and 2 over GT-Reward on GSM8K, in percent of it.
        for data, methods, gain in (("math", ("i", "ii"), 2.94), ("dapo", ("ii",), 5.44)):
            relative = [
                numbers[ModelLabels(name, data, f"co_rewarding_{method}"), "gsm8k"]
                / numbers[ModelLabels(name, data, "ground_truth"), "gsm8k"]
                - 1
                for name in ("Qwen3-8B-Base", "Qwen3-4B-Base", "Llama-3.2-3B-Instruct")
                for method in methods
            ]
            assert 100 * sum(relative) / len(relative) == pytest.approx(gain, abs=0.25)

    def test_latex_escapes_names(self) -> None:
        text = latex(self.RESULTS, read_numbers())
        assert r"A\_model & MATH & Entropy & 40.00 {\scriptsize [38.0, 42.0]} &  \\" in text
        assert r" &  & \emph{in the paper} & 94.01 & 53.31 \\" in text
        assert text.count(r"\\") == 1 + 3 + 2  # head, results, the paper

    def test_results_under_other_settings_are_pointed_out(self) -> None:
        other = PaperResult(LABELS, self.RESULTS[0].measured, {}, {"temperature": 0.8, "limit": 5})
        assert "Settings differ" in markdown([*self.RESULTS, other], {})
        assert "Settings differ" not in markdown(self.RESULTS, {})

    def test_more_numbers_come_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "numbers.csv"
        text = NUMBERS.read_text()
        file.write_text(text + "Qwen3-8B-Base,,untrained,gsm8k,27.5,a test\n")
        assert "| 27.50 |" in markdown(self.RESULTS, read_numbers(file))
        file.write_text(text + "Qwen3-8B-Base,,untrained,aime,27.5,a test\n")
        with pytest.raises(InputError, match="line 506: benchmark 'aime'; allowed"):
            read_numbers(file)
        file.write_text(text + "Qwen3-8B-Base,,untrained,gsm8k,much,a test\n")
        with pytest.raises(InputError, match="could not convert"):
            read_numbers(file)
        file.write_text("model,percent\n")
        with pytest.raises(InputError, match="found columns"):
            read_numbers(file)
        with pytest.raises(InputError, match="cannot be read"):
            read_numbers(tmp_path / "gone.csv")

    def test_tables_are_written_in_three_forms(self, tmp_path: Path) -> None:
        write_tables(tmp_path / "t", self.RESULTS, read_numbers())
        assert {path.name for path in (tmp_path / "t").iterdir()} == {"table.md", "table.csv", "table.tex"}

    def test_what_is_no_result_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no result of `evaluate paper` there"):
            read_paper_result(tmp_path)
        write_paper_result(tmp_path / "paper.json", self.RESULTS[0])
        assert read_paper_result(tmp_path) == self.RESULTS[0]
        (tmp_path / "paper.json").write_text('{"format": 1}')
        with pytest.raises(InputError, match="not a result of"):
            read_paper_result(tmp_path)
        with pytest.raises(InputError, match="no result given"):
            markdown([], {})
