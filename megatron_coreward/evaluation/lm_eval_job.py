"""One evaluation by lm-evaluation-harness, in a process of its own: `python -m ...lm_eval_job REQUEST.json`.

The harness sets seeds, log levels and caches for the whole process, and loads data with libraries of its own; all that
ends with this process. Its answer is a file: results by benchmark, or what was wrong with the request.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_coreward.algorithms.accuracy import bootstrap
from megatron_coreward.errors import InputError
from megatron_coreward.evaluation.benchmarks import BENCHMARKS, HarnessBenchmark
from megatron_coreward.evaluation.engine_lm import EngineLM, Generation
from megatron_coreward.evaluation.evaluate import Engines, Sampling, model_fingerprint, running_engines
from megatron_coreward.evaluation.json_files import write_json
from megatron_coreward.telemetry.job_log import JobLog
from megatron_coreward.trainer.sampling import SamplingEngines

SAMPLES_LOG = "samples.jsonl"
RESULTS = "results.json"
TASKS = Path(__file__).with_name("tasks")


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the benchmarks of a request (`evaluation.lm_eval.request`) and returns the results by name."""
    from lm_eval import simple_evaluate
    from transformers import AutoTokenizer

    from megatron_coreward.evaluation.sandbox import best_isolation

    model, out = Path(request["model"]), Path(request["out"])
    manager = _task_manager(request)
    tasks = _loaded(manager, request)
    runs_code = any(getattr(task, "UNSAFE_CODE", False) for task in tasks["tasks"].values())
    isolation = best_isolation() if runs_code else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = request["chat_template"] and tokenizer.chat_template is not None
    generation, engines = Generation(**request["generation"]), Engines(**request["engines"])
    identity = {
        "model": model_fingerprint(model),
        "generation": asdict(generation),
        "dtype": request["dtype"],
        "chat_template": chat,
        "thinking": request["thinking"],
        "max_length": request["max_length"],
    }

    @contextmanager
    def start(max_model_len: int) -> Iterator[SamplingEngines]:
        sampling = Sampling(seed=generation.seed, dtype=request["dtype"])
        with running_engines(model, engines, sampling, max_model_len, out / "logs") as group:
            yield group

    with JobLog(out / SAMPLES_LOG, identity) as job_log:
        lm = EngineLM(
            tokenizer,
            start,
            job_log,
            generation,
            max_length=request["max_length"],
            chat=chat,
            thinking=request["thinking"],
            batch_requests=engines.batch_questions,
            on_progress=lambda done, total: print(f"{done} of {total} answers", file=sys.stderr, flush=True),
        )
        found = simple_evaluate(
            lm,
            tasks=[*_top_level(tasks)],
            task_manager=manager,
            limit=request["limit"],
            apply_chat_template=chat,
            bootstrap_iters=0,
            confirm_run_unsafe_code=request["allow_code"],
            random_seed=generation.seed,
        )
    assert found is not None  # on the first rank, which is the only one
    return {
        name: _result(name, [samples for task in members for samples in found["samples"][task]])
        | {"metrics": _metrics(found, (_task(name), *members))}
        | {"settings": identity["generation"] | {"chat_template": chat, "isolation": isolation}}
        for name, members in _members(tasks, request["benchmarks"]).items()
    }


def _task_manager(request: Mapping[str, Any]) -> Any:
    """With the harness's own thousands of tasks only if one of them is asked for: to read them takes a while."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *request["include_paths"]]
    manager = TaskManager(include_path=folders, include_defaults=False)
    wanted = set(map(_task, request["benchmarks"]))
    return manager if wanted <= set(manager.all_tasks) else TaskManager(include_path=folders)


def _loaded(manager: Any, request: Mapping[str, Any]) -> Any:
    """The tasks; refused here if one cannot be found, or is not one that generates text."""
    wanted = []
    for name in request["benchmarks"]:
        benchmark = BENCHMARKS.get(name)
        if isinstance(benchmark, HarnessBenchmark):
            wanted.append(_with_data(manager, benchmark, Path(request["data"])))
        elif name in manager.all_tasks:
            wanted.append(name)
        else:
            raise InputError(
                f"benchmark {name!r}: unknown; allowed: {', '.join(_harness_names())}, or a task of "
                "lm-evaluation-harness or of --include-path"
            )
    tasks = manager.load(wanted)
    for name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            raise InputError(
                f"task {name}: its output_type is {task.OUTPUT_TYPE}, which asks for log-likelihoods of given texts; "
                "allowed: tasks with output_type generate_until"
            )
        if getattr(task, "UNSAFE_CODE", False) and not request["allow_code"]:
            raise InputError(f"task {name}: it executes code that the model wrote; allowed: --allow-code")
    return tasks


def _with_data(manager: Any, benchmark: HarnessBenchmark, data: Path) -> Any:
    """The benchmark's task or group, on the local copy of its data."""
    folder = (data / benchmark.folder).resolve()
    changes: dict[str, Any] = {"dataset_path": str(folder)}
    if benchmark.loads_files:
        files = sorted(str(file) for file in folder.glob(benchmark.files))
        changes = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": files}}}
    entry = manager.task_index[benchmark.task]
    return manager._factory.build(entry, overrides=changes, registry=manager.task_index)


def _top_level(tasks: Any) -> Iterator[Any]:
    """Groups, then what is in none of them: each once."""
    inside = {name for names in tasks["group_map"].values() for name in names}
    yield from (group for name, group in tasks["groups"].items() if name not in inside)
    yield from (task for name, task in tasks["tasks"].items() if name not in inside)


def _task(name: str) -> str:
    """What the harness calls a benchmark."""
    benchmark = BENCHMARKS.get(name)
    return benchmark.task if isinstance(benchmark, HarnessBenchmark) else name


def _members(tasks: Any, benchmarks: Sequence[str]) -> dict[str, list[str]]:
    """The tasks that each benchmark consists of."""
    members = {}
    for name in benchmarks:
        task = _task(name)
        group = tasks["groups"].get(task)
        members[name] = [task] if group is None else [child.task_name for child in group.get_all_tasks()]
    return members


def _result(name: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The benchmark's number with its interval over questions; of other tasks, the first metric's."""
    benchmark = BENCHMARKS.get(name)
    if isinstance(benchmark, HarnessBenchmark):
        metrics, metric, chosen = benchmark.metrics, benchmark.metric, benchmark.filter
    else:
        metric, chosen = samples[0]["metrics"][0], samples[0]["filter"]
        metrics = (metric,)
    chosen_samples = [sample for sample in samples if sample["filter"] == chosen]
    scores = mean_scores([[sample[name] for sample in chosen_samples] for name in metrics])
    return {"metric": metric, "num_questions": len(scores), **asdict(bootstrap(scores))}


def mean_scores(metrics: Sequence[Sequence[float | Sequence[float]]]) -> list[float]:
    """[Q] scores whose mean is the mean of several metrics of Q questions.

    A metric may have several values for a question (IFEval: one for each instruction), and is their mean over all
    questions: a question then counts as often as it has values.
    """
    columns = []
    for values in metrics:
        lists = [value if isinstance(value, Sequence) else [value] for value in values]
        per_question = sum(map(len, lists)) / len(lists)
        columns.append([sum(map(float, of_question)) / per_question for of_question in lists])
    return [sum(scores) / len(columns) for scores in zip(*columns, strict=True)]


def _metrics(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """All numbers of the harness, without standard errors and descriptions."""
    return {
        name: {
            metric: float(value)
            for metric, value in found["results"][name].items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric
        }
        for name in names
        if name in found["results"]
    }


def _harness_names() -> list[str]:
    return [name for name, benchmark in BENCHMARKS.items() if isinstance(benchmark, HarnessBenchmark)]


def main(path: Path) -> int:
    """Status 0 and the results, or 2 and what was wrong."""
    from megatron_coreward.cluster.ray_start import stop_ray

    request = json.loads(path.read_text())
    target, status = Path(request["out"]) / RESULTS, 0
    try:
        answer: dict[str, Any] = {"benchmarks": run(request)}
    except InputError as error:
        answer, status = {"error": str(error)}, 2
    finally:
        stop_ray()
    write_json(target, answer)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
