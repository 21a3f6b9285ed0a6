"""`rephrase MODEL FILE --out FILE`: every question rewritten by a model, checked, and written as the second view."""

import argparse
from pathlib import Path
from typing import Any

from megatron_coreward.commands.engines import add_engine_options, answering, chosen_engines
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    rephrase = commands.add_parser("rephrase", help="rewrite questions with a model, and keep what passes the checks")
    rephrase.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory")
    rephrase.add_argument("file", type=Path, metavar="FILE", help="parquet, as prepare-data writes it")
    rephrase.add_argument("--out", type=Path, required=True, help="parquet; journal and report are written beside it")
    rephrase.add_argument("--attempts", type=int, default=3, help="for a question whose rewriting was refused")
    rephrase.add_argument("--temperature", type=float, default=0.7)
    rephrase.add_argument("--top-p", type=float, default=0.95)
    rephrase.add_argument("--max-tokens", type=int, default=1024, help="of a reply")
    rephrase.add_argument("--seed", type=int, default=0)
    rephrase.add_argument(
        "--solver-samples", type=int, default=0, help="answers to both versions, whose majorities must agree; 0: none"
    )
    rephrase.add_argument("--solver-max-tokens", type=int, default=3072)
    rephrase.add_argument(
        "--refused",
        choices=("leave_out", "keep_original"),
        default="leave_out",
        help="a question of which no rewriting passed",
    )
    rephrase.add_argument("--batch-rows", type=int, default=64, help="what an interruption can lose")
    rephrase.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add_engine_options(rephrase)
    rephrase.set_defaults(run=_rephrase)


def _rephrase(options: argparse.Namespace) -> None:
    from megatron_coreward.evaluation.rephrase import Rewriting, rephrase_file

    with answering("rewritten") as progress:
        report = rephrase_file(
            options.model,
            options.file,
            options.out,
            Rewriting(
                attempts=options.attempts,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                seed=options.seed,
                solver_samples=options.solver_samples,
                solver_max_tokens=options.solver_max_tokens,
                batch_rows=options.batch_rows,
                refused=options.refused,
                thinking=options.thinking,
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
