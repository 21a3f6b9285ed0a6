"""Evaluation of a finished model: prepared questions through vLLM, resumable, with a result file, a table and a page.

OUT/samples.jsonl   what was sampled, question by question; a killed evaluation goes on from it
OUT/result.json     metrics with intervals, and every question (see `evaluation.results`)
OUT/page.html       the same for people

Invariants (tests/evaluation/test_evaluate.py): a question that is in the job log is not sampled again, however often
the evaluation is killed; a kill loses at most the batch in flight; a job log of another model, other data or other
sampling is refused. Grading is no part of a job log: a finished one is graded again in seconds under another
equivalence.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from megatron_coreward.cluster.engine_group import EngineGroup
from megatron_coreward.cluster.placement import START_LIMIT_S, ReservedPlacement
from megatron_coreward.cluster.ray_start import start_ray
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.config.schema import AnswerFormat
from megatron_coreward.data.dataset import ProblemSet, load_problems
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.json_files import write_json
from megatron_coreward.evaluation.page import write_comparison_page, write_evaluation_page
from megatron_coreward.evaluation.results import (
    FILE_NAME,
    Comparison,
    EvaluationResult,
    QuestionResult,
    compare,
    comparison_json,
    read_result,
    write_result,
)
from megatron_coreward.planner.placement import ResourceRequest
from megatron_coreward.rewards.answer import extract_answer
from megatron_coreward.rewards.equivalence import AnswerEquivalence, Relation
from megatron_coreward.rewards.scoring import score_answers
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.telemetry.job_log import Item, JobLog, refuse_former_name
from megatron_coreward.trainer.sampling import SamplingEngines, sample_groups
from megatron_coreward.types import Problem, RolloutGroup

SAMPLES_LOG = "samples.jsonl"
PAGE = "page.html"
VERSION = 0  # of the only weights that the engines ever hold
GREEDY = 0.0
NO_LIMIT = 1 << 30  # tokens of a prompt: nothing is trained on it
_SAMPLED_BYTES = 1 << 16  # of a weight file, at each of 16 places

Converter = Callable[[Path, Path], None]  # (Megatron checkpoint, empty folder to write a Hugging Face model to)
Progress = Callable[[int, int], None]  # (questions done, questions in all)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is drawn for each question; together with model and data it decides the log's content."""

    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 3072
    greedy: bool = True  # the most likely answer as well, for pass@1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        for name, allowed, good in (
            ("n", "1 or more", self.n >= 1),
            ("temperature", "more than 0", self.temperature > 0),
            ("top_p", "more than 0, at most 1", 0 < self.top_p <= 1),
            ("max_tokens", "1 or more", self.max_tokens >= 1),
        ):
            if not good:
                raise InputError(f"{name}: found {getattr(self, name)}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class GradingSettings:
    """How answers are read and compared."""

    equivalence: Relation = "math"
    answer_formats: tuple[AnswerFormat, ...] = ("boxed",)
    timeout_s: float = 5.0
    stop_at: tuple[str, ...] = ()  # see rewards.stop_at


@dataclass(frozen=True, slots=True)
class Engines:
    """How the work is spread; none of this changes what is drawn."""

    num_engines: int = 1
    tensor_parallel: int = 1
    max_num_seqs: int = 256
    kv_cache_gib: float = 1.0  # per engine rank, without GPUs
    gpu_memory_utilization: float = 0.9
    cpu_threads: int = 1
    batch_questions: int = 64  # questions between two entries in the log: what a kill can lose


def evaluate_files(
    model: Path,
    files: Sequence[Path],
    out: Path,
    sampling: Sampling,
    grading: GradingSettings,
    engines: Engines,
    *,
    system_prompt: str | None,
    thinking: bool | None = None,
    max_problems: int | None = None,
    convert: Converter | None = None,
    name: str | None = None,
    on_progress: Progress = lambda done, total: None,
) -> EvaluationResult:
    """Evaluates a model on parquet files in the published format and leaves result and page in `out`.

    Args:
        model: Hugging Face directory or, with `convert`, a Megatron checkpoint.
        system_prompt: replaces the files' own; None keeps theirs.
        thinking: see `data.prompts.build_prompts`.
        max_problems: only the first questions, as many as this.
        convert: see `hf_model_dir`.
        name: of the model in tables and pages; its path if None.

    Raises InputError for bad files, questions without a ground truth, and an `out` of another evaluation, all before
    an engine starts.
    """
    with hf_model_dir(model, convert) as hf_path:
        tokenizer = AutoTokenizer.from_pretrained(hf_path)
        problems = _problems(files, tokenizer, system_prompt, thinking, max_problems)
        identity = {
            "model": {"fingerprint": model_fingerprint(hf_path)},
            "data": {"questions": len(problems), "fingerprint": problems_fingerprint(problems)},
            "sampling": asdict(sampling),
        }
        refuse_former_name(out / SAMPLES_LOG, out / "journal.jsonl")
        with JobLog(out / SAMPLES_LOG, identity) as job_log:
            todo = [problem for problem in problems if problem.uid not in job_log]
            on_progress(len(problems) - len(todo), len(problems))
            if todo:
                max_model_len = max(len(p.prompts["original"].token_ids) for p in problems) + sampling.max_tokens
                with running_engines(hf_path, engines, sampling, max_model_len, out / "logs") as group:
                    sample_into(
                        job_log,
                        group,
                        todo,
                        sampling,
                        engines.batch_questions,
                        on_batch=lambda done: on_progress(len(problems) - len(todo) + done, len(problems)),
                    )
            result = grade_samples(job_log, problems, grading, name or str(model), identity)
    write_result(out / FILE_NAME, result)
    write_evaluation_page(out / PAGE, result)
    return result


def compare_files(a: Path, b: Path, out: Path | None = None) -> Comparison:
    """Compares two results (files or evaluation folders); with `out`, leaves comparison.json and comparison.html there.

    Raises InputError if one is no result, or if they share no question or metric.
    """
    comparison = compare(read_result(a), read_result(b))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "comparison.json", comparison_json(comparison))
        write_comparison_page(out / "comparison.html", comparison)
    return comparison


@contextmanager
def hf_model_dir(model: Path, convert: Converter | None = None) -> Iterator[Path]:
    """A Hugging Face directory of the model while the block runs: itself, or a temporary one that `convert` writes.

    Raises InputError if the path is neither a Hugging Face directory nor something `convert` may be asked for.
    """
    if (model / "config.json").is_file():
        yield model.resolve()
        return
    if not model.is_dir():
        raise InputError(f"{model}: no such directory; allowed: a Hugging Face model or a Megatron checkpoint")
    if convert is None:
        raise InputError(f"{model}: no config.json in it; allowed: a Hugging Face model directory")
    with tempfile.TemporaryDirectory(prefix="megatron-coreward-hf-") as folder:
        convert(model.resolve(), Path(folder))
        yield Path(folder)


def model_fingerprint(hf_path: Path) -> str:
    """A digest of a model: config and tokenizer files whole; of each weight file its size, its head and 16 samples.

    Equal weights have equal fingerprints wherever they lie; reading all of a large model would take minutes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(hf_path.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".model", ".txt", ".jinja", ".bin"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            if file.suffix not in (".safetensors", ".bin"):
                digest.update(content.read())
                continue
            for place in range(16):
                content.seek(max(0, size - _SAMPLED_BYTES) * place // 15)
                digest.update(content.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def problems_fingerprint(problems: Sequence[Problem]) -> str:
    """A digest of what is asked: the questions' names and prompt tokens, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for problem in problems:
        digest.update(problem.uid.encode() + b"\0" + problem.prompts["original"].token_ids.tobytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def running_engines(
    hf_path: Path, engines: Engines, sampling: Sampling, max_model_len: int, logs: Path
) -> Iterator[EngineGroup]:
    """Engines that hold the model's own weights as `VERSION`; ended in any case. `logs` takes what they print."""
    setup = EngineSetup(
        hf_path,
        sampling.dtype,
        max_model_len,
        tensor_parallel=engines.tensor_parallel,
        max_num_seqs=engines.max_num_seqs,
        kv_cache_gib=engines.kv_cache_gib,
        gpu_memory_utilization=engines.gpu_memory_utilization,
        cpu_threads=engines.cpu_threads,
        seed=sampling.seed,
        own_weights=VERSION,
    )
    start_ray()
    request = ResourceRequest.of_engines(engines.num_engines, engines.tensor_parallel)
    with ExitStack() as stack:
        placement = stack.enter_context(ReservedPlacement(request, START_LIMIT_S))
        group = EngineGroup(setup, engines.num_engines, placement, Watchdog(logs=logs))
        stack.callback(group.shutdown)
        group.wait()
        yield group


def sample_into(
    job_log: JobLog,
    engines: SamplingEngines,
    problems: Sequence[Problem],
    sampling: Sampling,
    batch_questions: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> None:
    """Samples questions batch by batch; each batch is in the log before the next one starts.

    What is drawn for a question depends on the seed and the question alone, so batches and restarts change nothing.
    """

    def draw(batch: Sequence[Problem], n: int, temperature: float) -> list[RolloutGroup]:
        return sample_groups(
            engines,
            batch,
            ("original",),
            "policy",
            n=n,
            temperature=temperature,
            top_p=sampling.top_p if temperature else 1.0,
            max_tokens=sampling.max_tokens,
            version=VERSION,
            step=0,
            seed=sampling.seed,
            answer_formats=(),  # answers are read when samples are graded
        )

    for start in range(0, len(problems), batch_questions):
        batch = problems[start : start + batch_questions]
        sampled = draw(batch, sampling.n, sampling.temperature)
        greedy = draw(batch, 1, GREEDY) if sampling.greedy else [None] * len(batch)
        job_log.append(
            {
                problem.uid: {"samples": _texts(drawn), "greedy": _texts(likeliest)[0] if likeliest else None}
                for problem, drawn, likeliest in zip(batch, sampled, greedy, strict=True)
            }
        )
        on_batch(start + len(batch))


def grade_samples(
    job_log: JobLog, problems: Sequence[Problem], grading: GradingSettings, name: str, identity: Mapping[str, Any]
) -> EvaluationResult:
    """The result of a log that has all the questions."""
    with AnswerEquivalence(grading.equivalence, grading.timeout_s) as equivalence:
        equivalence.compare([(*_answers(job_log[problem.uid], grading), problem.ground_truth) for problem in problems])
        questions = tuple(_scored(problem, job_log[problem.uid], grading, equivalence) for problem in problems)
    return EvaluationResult(name, identity, asdict(grading), questions)


def _answers(item: Item, grading: GradingSettings) -> tuple[str | None, ...]:
    return tuple(_answer(sample, grading) for sample in item["samples"])


def _answer(sample: Mapping[str, Any], grading: GradingSettings) -> str | None:
    return extract_answer(sample["text"], grading.answer_formats, grading.stop_at)


def _scored(problem: Problem, item: Item, grading: GradingSettings, equivalence: AnswerEquivalence) -> QuestionResult:
    answers = _answers(item, grading)
    graded = score_answers(answers, problem.ground_truth, equivalence)
    likeliest = item["greedy"]
    greedy = None if likeliest is None else _answer(likeliest, grading)
    return QuestionResult(
        uid=problem.uid,
        source=problem.source,
        question=problem.prompts["original"].text,
        ground_truth=problem.ground_truth,
        greedy=greedy,
        greedy_right=None if likeliest is None else equivalence.equivalent(greedy, problem.ground_truth),
        answers=answers,
        right=graded.right,
        majority=graded.majority,
        majority_right=graded.majority_right,
        truncated=sum(sample["finish_reason"] == "length" for sample in item["samples"]),
    )


def _texts(group: RolloutGroup) -> list[dict[str, Any]]:
    return [{"text": c.text, "finish_reason": c.finish_reason, "tokens": len(c.token_ids)} for c in group.completions]


def _problems(
    files: Sequence[Path], tokenizer: Any, system_prompt: str | None, thinking: bool | None, max_problems: int | None
) -> ProblemSet | tuple[Problem, ...]:
    prompting: dict[str, Any] = {"system_prompt": system_prompt, "thinking": thinking, "max_prompt_tokens": NO_LIMIT}
    problems = load_problems(files, (), tokenizer, **prompting)
    if problems.num_without_ground_truth:
        raise InputError(
            f"{', '.join(map(str, files))}: {problems.num_without_ground_truth} of {len(problems)} questions have no "
            "reward_model.ground_truth; allowed: questions with an answer to compare with"
        )
    if max_problems is not None and max_problems < 1:
        raise InputError(f"max_problems: found {max_problems}; allowed: 1 or more")
    return problems if max_problems is None else problems[:max_problems]
