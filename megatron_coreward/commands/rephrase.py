"""`rephrase MODEL FILE --out FILE`: every question rewritten by a model, checked, and written as the second view."""

import argparse
from pathlib import Path
from typing import Any

from megatron_coreward.commands.arguments import SEED, number, whole
from megatron_coreward.commands.engines import add_engine_options, answering, chosen_engines
from megatron_coreward.data.rewriting_prompts import PROMPTS
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    rephrase = commands.add_parser(
        "rephrase",
        help="rewrite questions with a model, and keep what passes the checks",
        example="megatron-coreward rephrase models/Qwen3-32B data/math.parquet --out data/math_rephrased.parquet",
    )
    rephrase.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory of the model")
    rephrase.add_argument("file", type=Path, metavar="FILE", help="parquet file in the format of prepare-data")
    rephrase.add_argument(
        "--out", type=Path, required=True, help="parquet file to write; replies and report are written beside it"
    )
    rephrase.add_argument(
        "--attempts",
        type=whole(1),
        default=3,
        help="most attempts for each question; another one follows if the rewriting was refused",
    )
    rephrase.add_argument(
        "--prompt",
        choices=tuple(PROMPTS),
        default="own",
        help="prompt for the rewriting; `paper` is that of the paper, with its sampling",
    )
    rephrase.add_argument("--no-filter", action="store_true", help="accept every rewriting that can be parsed")
    rephrase.add_argument(
        "--temperature", type=number(above=0), help=f"sampling temperature; {_by_prompt('temperature')}"
    )
    rephrase.add_argument(
        "--top-p",
        type=number(above=0, most=1),
        help=f"share of probability that replies are drawn from; {_by_prompt('top_p')}",
    )
    rephrase.add_argument("--max-tokens", type=whole(1), help=f"longest reply in tokens; {_by_prompt('max_tokens')}")
    rephrase.add_argument("--seed", type=whole(0, SEED), default=0, help="random seed of sampling")
    rephrase.add_argument(
        "--solver-samples",
        type=whole(0),
        default=0,
        help="number of answers to each version of a question, whose majorities must agree; 0: no such check",
    )
    rephrase.add_argument(
        "--solver-max-tokens", type=whole(1), default=3072, help="longest answer of the solver in tokens"
    )
    rephrase.add_argument(
        "--refused",
        choices=("leave_out", "keep_original"),
        default="leave_out",
        help="what happens to a question without a rewriting that passes",
    )
    rephrase.add_argument(
        "--batch-rows",
        type=whole(1),
        default=64,
        help="number of questions that are rewritten together, which an interruption can lose",
    )
    rephrase.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="data type of the weights"
    )
    add_engine_options(rephrase)
    rephrase.set_defaults(run=_rephrase)


def _by_prompt(field: str) -> str:
    return "default: " + ", ".join(f"{getattr(prompt, field)} ({name})" for name, prompt in PROMPTS.items())


def _rephrase(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.rephrase import Rewriting, rephrase_file

    prompt = PROMPTS[options.prompt]

    def chosen(name: str) -> Any:
        given = getattr(options, name)
        return getattr(prompt, name) if given is None else given

    with answering("rewritten") as progress:
        report = rephrase_file(
            options.model,
            options.file,
            options.out,
            Rewriting(
                prompt=options.prompt,
                filter=not options.no_filter,
                attempts=options.attempts,
                temperature=chosen("temperature"),
                top_p=chosen("top_p"),
                max_tokens=chosen("max_tokens"),
                seed=options.seed,
                solver_samples=options.solver_samples,
                solver_max_tokens=options.solver_max_tokens,
                batch_rows=options.batch_rows,
                refused=options.refused,
                thinking=chosen("thinking"),
            ),
            chosen_engines(options),
            dtype=options.dtype,
            on_progress=progress,
        )
    say(f"{report.written} of {report.rows} questions rewritten with {report.replies} replies")
    for name, counts in (("replies refused", report.refused_replies), ("checks failed", report.failed_checks)):
        if counts:
            say(f"  {name}: " + ", ".join(f"{count} {why}" for why, count in counts.items()))
    say(f"report: {options.out.with_name(f'{options.out.stem}.report.html')}")
