"""`evaluate run | compare | lm-eval | paper | table`: how good a model is, and the paper's table."""

import argparse
from pathlib import Path
from typing import Any, get_args

from megatron_coreward.commands.arguments import SEED, FormerOption, number, whole
from megatron_coreward.commands.engines import add_engine_options, answering, chosen_engines
from megatron_coreward.config.schema import SYSTEM_PROMPT, AnswerFormat, Equivalence
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure pass@1, avg@k, pass@k and maj@k on prepared questions, with intervals",
        example="megatron-coreward evaluate run models/trained data/math500.parquet --out results/trained",
    )
    actions = evaluate.add_subparsers(required=True, metavar="ACTION")
    _add_run(actions)
    _add_compare(actions)
    _add_lm_eval(actions)
    _add_paper(actions)
    _add_table(actions)
    former = actions.add_parser("harness", add_help=False, prefix_chars="\0")  # takes anything, is not listed
    former.add_argument("anything", nargs="*")
    former.set_defaults(run=_renamed)


def _add_run(actions: Any) -> None:
    run = actions.add_parser(
        "run",
        help="sample answers and grade them; the same command continues an interrupted evaluation",
        example="megatron-coreward evaluate run models/trained data/math500.parquet --out results/trained --n 16",
    )
    run.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory or Megatron checkpoint")
    run.add_argument("files", type=Path, nargs="+", metavar="FILE", help="parquet file in the format of prepare-data")
    run.add_argument("--out", type=Path, required=True, help="directory for samples.jsonl, result.json and page.html")
    run.add_argument("--name", help="name of the model in tables; default: its path")
    run.add_argument("--n", type=whole(1), default=8, help="number of samples for each question")
    run.add_argument("--temperature", type=number(above=0), default=1.0, help="sampling temperature")
    run.add_argument(
        "--top-p", type=number(above=0, most=1), default=1.0, help="share of probability that samples are drawn from"
    )
    run.add_argument("--max-tokens", type=whole(1), default=3072, help="longest answer in tokens")
    run.add_argument("--no-greedy", action="store_true", help="do not sample the greedy answer, which pass@1 needs")
    run.add_argument("--seed", type=whole(0, SEED), default=0, help="random seed of sampling")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="data type of the weights")
    run.add_argument(
        "--equivalence", choices=get_args(Equivalence), default="math", help="rule by which two answers are the same"
    )
    run.add_argument(
        "--answer-format",
        action="append",
        choices=get_args(AnswerFormat),
        help="forms of the final answer, tried in the order given; default: boxed",
    )
    run.add_argument("--answer-form", action=FormerOption, const="--answer-format")
    run.add_argument(
        "--stop-at",
        action="append",
        metavar="TEXT",
        help="ignore what follows this text if there is an answer before it",
    )
    add_engine_options(run)
    run.add_argument(
        "--batch-questions",
        type=whole(1),
        default=64,
        help="number of questions that are sampled together, which an interruption can lose",
    )
    run.add_argument("--max-problems", type=whole(1), help="largest number of questions, the first ones of the files")
    prompt = run.add_mutually_exclusive_group()
    prompt.add_argument(
        "--system-prompt", default=SYSTEM_PROMPT, help="system prompt of every question; default: that of training"
    )
    prompt.add_argument("--keep-system-prompt", action="store_true", help="use the system prompts of the files")
    run.add_argument(
        "--hf-path", type=Path, help="directory with config.json and tokenizer, for a Megatron checkpoint without them"
    )
    run.set_defaults(run=_run)


def _add_compare(actions: Any) -> None:
    compare = actions.add_parser(
        "compare",
        help="compare two evaluations of the same questions with a paired test",
        example="megatron-coreward evaluate compare results/base results/trained",
    )
    compare.add_argument("a", type=Path, metavar="A", help="directory or result.json of an evaluation")
    compare.add_argument("b", type=Path, metavar="B", help="the other one")
    compare.add_argument("--out", type=Path, help="directory for the comparison as JSON and a page")
    compare.set_defaults(run=_compare)


def _add_lm_eval(actions: Any) -> None:
    lm_eval = actions.add_parser(
        "lm-eval",
        help="measure IFEval, MMLU-Pro, CRUX ... through lm-evaluation-harness and vLLM",
        example="megatron-coreward evaluate lm-eval models/trained ifeval mmlu_pro --out results/trained-lm-eval",
    )
    lm_eval.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory or Megatron checkpoint")
    lm_eval.add_argument(
        "benchmarks", nargs="+", metavar="BENCHMARK", help="a benchmark of the paper, or a task of the harness"
    )
    lm_eval.add_argument("--out", type=Path, required=True, help="directory for samples.jsonl and results.json")
    _add_common(lm_eval)
    lm_eval.add_argument(
        "--temperature", type=number(least=0), default=0.8, help="sampling temperature; 0: the most likely text"
    )
    lm_eval.add_argument("--task-temperature", action="store_true", help="use the temperature of each task")
    lm_eval.add_argument(
        "--top-p",
        type=number(above=0, most=1),
        help="share of probability that samples are drawn from; default: that of each task",
    )
    lm_eval.add_argument("--max-tokens", type=whole(1), help="longest answer in tokens; default: that of each task")
    lm_eval.add_argument(
        "--max-model-len", type=whole(2), help="most tokens of prompt and answer together; default: the model's"
    )
    lm_eval.add_argument(
        "--no-chat-template", action="store_true", help="use the tasks' prompts without the model's chat template"
    )
    lm_eval.add_argument("--include-path", type=Path, help="directory with further task definitions")
    lm_eval.set_defaults(run=_lm_eval)


def _add_paper(actions: Any) -> None:
    paper = actions.add_parser(
        "paper",
        help="measure the paper's benchmarks, as far as their data is there",
        example="megatron-coreward evaluate paper models/trained --out results/paper --base Qwen3-8B",
    )
    paper.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory or Megatron checkpoint")
    paper.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory to write into; the same command continues an interrupted evaluation",
    )
    _add_common(paper)
    paper.add_argument("--benchmarks", nargs="+", metavar="BENCHMARK", help="only these benchmarks; default: all")
    paper.add_argument("--max-tokens", type=whole(1), default=3072, help="longest answer in tokens")
    said = "default: that of the run's config, if the model is in a run directory"
    paper.add_argument("--base", help=f"name of the model before training, for the table; {said}")
    paper.add_argument("--trained-on", help=f"name of the training set, for the table; {said}")
    paper.add_argument("--method", help=f"name of the method, for the table; {said}, and otherwise untrained")
    paper.set_defaults(run=_paper)


def _add_table(actions: Any) -> None:
    table = actions.add_parser(
        "table",
        help="write results of `evaluate paper` as the paper's table, with the paper's numbers",
        example="megatron-coreward evaluate table results/paper results/paper-base --out tables",
    )
    table.add_argument("results", type=Path, nargs="+", metavar="DIR", help="directories of `evaluate paper`")
    table.add_argument("--out", type=Path, help="directory for table.md, table.csv and table.tex")
    table.add_argument(
        "--paper-numbers", type=Path, help="CSV file of the paper's numbers; default: the file of this package"
    )
    table.set_defaults(run=_table)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data"), help="directory with the benchmarks' data")
    parser.add_argument("--limit", type=whole(1), help="largest number of questions of each task, its first ones")
    parser.add_argument("--seed", type=whole(0, SEED), default=0, help="random seed of sampling")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="data type of the weights")
    parser.add_argument(
        "--batch-questions",
        type=whole(1),
        default=64,
        help="number of questions that are sampled together, which an interruption can lose",
    )
    parser.add_argument("--allow-code", action="store_true", help="run code that the model wrote, in a sandbox")
    add_engine_options(parser)
    parser.add_argument(
        "--hf-path", type=Path, help="directory with config.json and tokenizer, for a Megatron checkpoint without them"
    )


def _renamed(options: argparse.Namespace) -> None:
    from megatron_coreward.errors import InputError

    raise InputError("evaluate harness: this command is called `evaluate lm-eval` now")


def _converter(hf_path: Path | None) -> Any:
    """Writes a Megatron checkpoint into an empty folder as a Hugging Face model."""
    from megatron_coreward.checkpoint.convert import to_hf

    def convert(source: Path, folder: Path) -> None:
        folder.rmdir()  # the converter makes it again, whole or not at all
        to_hf(source, folder, hf_path=hf_path)

    return convert


def _run(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.evaluate import GradingSettings, Sampling, evaluate_files
    from megatron_coreward.evaluation.results import result_table

    with answering("questions") as progress:
        result = evaluate_files(
            options.model,
            options.files,
            options.out,
            Sampling(
                n=options.n,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                greedy=not options.no_greedy,
                seed=options.seed,
                dtype=options.dtype,
            ),
            GradingSettings(
                options.equivalence,
                tuple(options.answer_format or ("boxed",)),
                stop_at=tuple(options.stop_at or ()),
            ),
            chosen_engines(options, batch_questions=options.batch_questions),
            system_prompt=None if options.keep_system_prompt else options.system_prompt,
            thinking=options.thinking,
            max_problems=options.max_problems,
            convert=_converter(options.hf_path),
            name=options.name,
            on_progress=progress,
        )
    _show(result_table(result))


def _compare(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.evaluate import compare_files
    from megatron_coreward.evaluation.results import comparison_table

    _show(comparison_table(compare_files(options.a, options.b, options.out)))


def _lm_eval(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.evaluate import hf_model_dir
    from megatron_coreward.evaluation.lm_eval import run_lm_eval

    with hf_model_dir(options.model, _converter(options.hf_path)) as hf_path:
        results = run_lm_eval(
            hf_path,
            options.benchmarks,
            options.out,
            chosen_engines(options, batch_questions=options.batch_questions),
            data=options.data,
            dtype=options.dtype,
            temperature=None if options.task_temperature else options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            seed=options.seed,
            max_model_len=options.max_model_len,
            limit=options.limit,
            chat_template=not options.no_chat_template,
            thinking=options.thinking,
            allow_code=options.allow_code,
            include_path=options.include_path,
        )
    for name, row in results.items():
        say(
            f"{name}: {row['metric']} {row['value']:.1%} ({row['low']:.1%} .. {row['high']:.1%}) of "
            f"{row['num_questions']} questions"
        )
        for task, metrics in row["metrics"].items():
            say("  ".join([f"  {task}", *(f"{metric} {value:.4f}" for metric, value in metrics.items())]))


def _paper(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.benchmarks import BENCHMARKS
    from megatron_coreward.evaluation.paper import PaperSettings, evaluate_paper, model_labels
    from megatron_coreward.evaluation.paper_table import markdown, read_numbers

    numbers = read_numbers()
    with answering("questions") as progress:
        result = evaluate_paper(
            options.model,
            options.out,
            chosen_engines(options, batch_questions=options.batch_questions),
            data=options.data,
            labels=model_labels(options.model, options.base, options.trained_on, options.method),
            settings=PaperSettings(
                max_tokens=options.max_tokens,
                seed=options.seed,
                limit=options.limit,
                thinking=options.thinking,
                dtype=options.dtype,
            ),
            benchmarks=options.benchmarks or tuple(BENCHMARKS),
            allow_code=options.allow_code,
            convert=_converter(options.hf_path),
            on_progress=lambda benchmark, done, total: progress(done, total),
        )
    say(markdown([result], numbers).rstrip())
    for name, reason in result.not_measured.items():
        say(f"not measured: {name}: {reason}")


def _table(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.paper import read_paper_result
    from megatron_coreward.evaluation.paper_table import NUMBERS, markdown, read_numbers, write_tables

    results = [read_paper_result(folder) for folder in options.results]
    numbers = read_numbers(options.paper_numbers or NUMBERS)
    say(markdown(results, numbers).rstrip())
    if options.out is not None:
        write_tables(options.out, results, numbers)


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
