"""`prepare-data SOURCE --out FILE`: question sets into the parquet format that training reads, with a summary."""

import argparse
from pathlib import Path
from typing import Any, get_args

from megatron_coreward.commands.arguments import whole
from megatron_coreward.config.schema import SYSTEM_PROMPT
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.untrusted_text import say


def add(commands: Any) -> None:
    from megatron_coreward.data.sources import GENERIC, SOURCES, AnswerFrom

    prepare = commands.add_parser(
        "prepare-data",
        help="convert question sets into the parquet format that training reads",
        example="megatron-coreward prepare-data math --input data/math.jsonl --out data/math.parquet",
    )
    prepare.add_argument("source", choices=(*SOURCES, GENERIC), metavar="SOURCE", help=", ".join((*SOURCES, GENERIC)))
    prepare.add_argument(
        "--input",
        type=Path,
        nargs="+",
        default=[],
        help="local parquet, jsonl or json files; default: the Hugging Face hub",
    )
    prepare.add_argument(
        "--out", type=Path, help="parquet file to write; default: the place where the recipes look for it"
    )
    prepare.add_argument("--split", help="split of the source; default: its first one")
    prepare.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        help="prepared files; the summary says how many questions they share with the new one",
    )
    prepare.add_argument(
        "--tokenizer", type=Path, help="model directory whose tokenizer adds lengths in tokens to the summary"
    )
    prepare.add_argument("--question-column", help="column of the question in local files")
    prepare.add_argument("--answer-column", help="column of the answer in local files")
    prepare.add_argument("--answer-from", choices=get_args(AnswerFrom), help="form of the answer in its column")
    prepare.add_argument("--system-prompt", default=SYSTEM_PROMPT, help="system prompt of every question; '' for none")
    prepare.add_argument(
        "--data-source",
        metavar="NAME",
        help="data source of the rows; two sets with the same source and indices cannot be in one run",
    )
    prepare.add_argument(
        "--skip-bad", action="store_true", help="leave out rows without question or answer, and list them"
    )
    prepare.add_argument(
        "--view",
        choices=("original", "rephrased"),  # `types.VIEWS`, which would import numpy to print help
        default="original",
        help="question to take from a file of pairs",
    )
    prepare.add_argument("--limit", type=whole(1), help="largest number of rows, the first ones")
    prepare.add_argument("--json", action="store_true", help="print the summary as JSON")
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from megatron_coreward.data.hub import fetch
    from megatron_coreward.data.prepare import prepare
    from megatron_coreward.data.sources import find_source

    if options.data_source is not None and not options.data_source.strip():
        raise InputError("--data-source: found no name; allowed: a name, or no such option for the source's own")
    source = find_source(
        options.source,
        question=options.question_column,
        answer=options.answer_column,
        answer_from=options.answer_from,
        data_source=options.data_source,
    )
    split = options.split or (source.splits[0] if source.splits else "train")
    if source.splits and split not in source.splits:
        raise InputError(f"--split: {source.name} has {', '.join(source.splits)}, found {split}")
    target = options.out or source.default_path(split)
    if target is None:
        raise InputError(f"--out: source {source.name} needs a file to write")
    if options.out is None and target.exists():  # it may be a published file, which a small try would replace
        raise InputError(f"{target} exists; give it as --out to replace it, or another file")
    tokenizer = None
    if options.tokenizer is not None:
        from transformers import AutoTokenizer

        if not options.tokenizer.is_dir():
            raise InputError(f"--tokenizer: {options.tokenizer} is no model directory")
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    summary = prepare(
        source,
        options.input or fetch(source, split),
        target,
        split=split,
        system_prompt=options.system_prompt or None,
        against=options.against,
        tokenizer=tokenizer,
        limit=options.limit,
        skip_bad=options.skip_bad,
        view=options.view,
        rename=options.data_source is not None,
    )
    if options.json:
        print(summary.to_json())
        return
    say(f"{target}: {summary.rows} questions, {summary.duplicates} of them repeat an earlier one")
    for unit, lengths in (("characters", summary.characters), ("tokens", summary.tokens)):
        if lengths is not None:
            say(f"  {unit}: {lengths.least} to {lengths.most}, median {lengths.median}, 99% up to {lengths.p99}")
    say("  answers: " + ", ".join(f"{count} {name}" for name, count in summary.answer_types.items()))
    if summary.skipped:
        say("\n    ".join([f"  left out: {len(summary.skipped)} rows", *summary.skipped]))
    for file, count in summary.overlaps.items():
        say(f"  questions that {file} has too: {count}")
