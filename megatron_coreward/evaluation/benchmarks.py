"""The paper's benchmarks (arXiv 2508.00410, section 4.1): how each is measured, where its data is, how to get it.

All data is in one folder. The mathematical ones are parquet files where `prepare-data` writes them; the others are
copies of the hub's repositories, which lm-evaluation-harness reads. Nothing here downloads anything.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TEMPERATURE = 0.8  # of the paper's evaluation


@dataclass(frozen=True, slots=True)
class MathBenchmark:
    """Questions with an answer, sampled and graded by `evaluation.evaluate`."""

    title: str
    file: str
    samples: int  # of a question
    prepare: str  # source and split of `prepare-data`

    @property
    def metric(self) -> str:
        return f"avg@{self.samples}"


@dataclass(frozen=True, slots=True)
class HarnessBenchmark:
    """A task of lm-evaluation-harness, one sample a question."""

    title: str
    task: str
    metrics: tuple[str, ...]  # of the task's samples; the benchmark's number is the mean of their means
    folder: str
    repository: str  # of the data, on the Hugging Face hub
    files: str  # pattern of the data in the folder
    filter: str = "none"  # the task's filter that the metric is taken after
    runs_code: bool = False  # executes what the model wrote
    nltk: str | None = None  # a resource of nltk that the task reads
    loads_files: bool = False  # the folder has a loading script as well, so its files are named to the task

    @property
    def metric(self) -> str:
        return self.metrics[0] if len(self.metrics) == 1 else f"mean of {len(self.metrics)} accuracies"


Benchmark = MathBenchmark | HarnessBenchmark

BENCHMARKS: Mapping[str, Benchmark] = {
    "math500": MathBenchmark("MATH500", "math500/test.parquet", 1, "math500 --split test"),
    "gsm8k": MathBenchmark("GSM8K", "gsm8k/test.parquet", 1, "gsm8k --split test"),
    "amc": MathBenchmark("AMC", "amc/train_original.parquet", 8, "amc --split train"),
    "livecodebench": HarnessBenchmark(
        "LiveCodeBench",
        "coreward_livecodebench",
        ("acc",),
        "livecodebench",
        "livecodebench/code_generation_lite",
        "*.jsonl",
        runs_code=True,
        loads_files=True,
    ),
    "crux": HarnessBenchmark(
        "CRUX", "coreward_crux", ("acc",), "cruxeval", "cruxeval-org/cruxeval", "**/test*", runs_code=True
    ),
    "mmlu_pro": HarnessBenchmark(
        "MMLU-Pro",
        "mmlu_pro",
        ("exact_match",),
        "mmlu_pro",
        "TIGER-Lab/MMLU-Pro",
        "**/test*",
        filter="custom-extract",
    ),
    "ifeval": HarnessBenchmark(
        "IFEval",
        "ifeval",
        ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc"),
        "ifeval",
        "google/IFEval",
        "**/*.jsonl",
        nltk="tokenizers/punkt_tab",
    ),
}


def missing(name: str, data: Path, *, allow_code: bool) -> str | None:
    """Why a benchmark cannot run, with what to do about it; None: it can."""
    benchmark = BENCHMARKS[name]
    if isinstance(benchmark, MathBenchmark):
        file = data / benchmark.file
        command = f"megatron-coreward prepare-data {benchmark.prepare} --out {file}"
        return None if file.is_file() else f"no {file}; get it: {command}"
    if importlib.util.find_spec("lm_eval") is None:
        return 'lm-evaluation-harness is not installed; get it: pip install "megatron-coreward[evaluation]"'
    folder = data / benchmark.folder
    if not any(folder.glob(benchmark.files)):
        command = f"hf download --repo-type dataset {benchmark.repository} --local-dir {folder}"
        return f"no {benchmark.files} in {folder}; get it: {command}"
    if benchmark.nltk is not None and not _nltk_has(benchmark.nltk):
        return f"nltk has no {benchmark.nltk}; get it: python -m nltk.downloader {benchmark.nltk.rpartition('/')[2]}"
    if benchmark.runs_code and not allow_code:
        return "it executes code that the model wrote, in a sandbox; allow it: --allow-code"
    return None


def _nltk_has(resource: str) -> bool:
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True
