"""`report`, `compare` and `replay`: looking at runs after the fact, on any machine."""

import argparse
from pathlib import Path
from typing import Any, get_args

from megatron_coreward.config.schema import Equivalence
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write one page about a run (curves, alarms, times, samples), and give trackers the rows that they lack",
        example="megatron-coreward report runs/demo/co_rewarding_i",
    )
    report.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    report.add_argument("--out", type=Path, help="page to write (default: report.html in the run directory)")
    report.add_argument("--steps", type=int, default=16, help="largest number of steps whose samples are shown")
    report.add_argument(
        "--questions", type=int, default=8, help="largest number of questions that are shown of each step"
    )
    report.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write the timeline of all steps as a Chrome trace"
    )
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare",
        help="compare several runs on one page",
        example="megatron-coreward compare runs/demo/co_rewarding_i runs/demo/majority_voting --out both.html",
    )
    compare.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run directories")
    compare.add_argument("--out", type=Path, default=Path("comparison.html"), help="page to write")
    compare.set_defaults(run=_compare)

    replay = commands.add_parser(
        "replay",
        help="recompute votes, rewards, advantages and guard decisions from a run's samples; status 1 if they differ",
        example="megatron-coreward replay runs/demo/co_rewarding_i --steps 10-20",
    )
    replay.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory with rollouts")
    replay.add_argument("--steps", metavar="FIRST-LAST", help="only these steps, such as 10-20 or 7")
    replay.add_argument(
        "--equivalence",
        choices=get_args(Equivalence),
        help="show instead what this rule for equal answers would have changed",
    )
    replay.set_defaults(run=_replay)


def _report(options: argparse.Namespace) -> None:
    from megatron_coreward.report.missed import bring_to_trackers
    from megatron_coreward.report.report import write_report
    from megatron_coreward.report.samples import Limits

    for name in ("steps", "questions"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name}: found {getattr(options, name)}; allowed: 0 or more")
    say(str(write_report(options.run_dir, options.out, Limits(options.steps, options.questions))))
    if options.trace is not None:
        from megatron_coreward.report.timeline import write_trace

        say(str(write_trace(options.run_dir, options.trace)))
    for line in bring_to_trackers(options.run_dir):
        say(line)


def _compare(options: argparse.Namespace) -> None:
    from megatron_coreward.report.compare import write_comparison

    say(str(write_comparison(options.run_dirs, options.out)))


def _replay(options: argparse.Namespace) -> None:
    from megatron_coreward.report.counterfactual import counterfactual, counterfactual_summary
    from megatron_coreward.report.replay import replay, summary
    from megatron_coreward.report.run_record import load_record

    record, steps = load_record(options.run_dir), _steps(options.steps)
    if options.equivalence is not None:
        say(
            "\n".join(
                counterfactual_summary(record, options.equivalence, counterfactual(record, options.equivalence, steps))
            )
        )
        return
    result = replay(record, steps)
    say("\n".join(summary(record, result)))
    if not result.equal:
        raise SystemExit(1)


def _steps(text: str | None) -> range | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
        raise InputError(f"--steps: found {text!r}; allowed: one step, such as 7, or a range, such as 10-20")
    return range(int(first), int(last or first) + 1)
