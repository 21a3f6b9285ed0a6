"""`convert to-megatron | to-hf | verify`: checkpoints between Hugging Face and Megatron."""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_coreward.commands.arguments import whole
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.telemetry.untrusted_text import say

_DTYPES = ("float32", "bfloat16", "float16")


def add(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert checkpoints between Hugging Face and Megatron, and verify them",
        example="megatron-coreward convert to-megatron models/Qwen3-8B checkpoints/qwen3-8b",
    )
    actions = convert.add_subparsers(required=True, metavar="ACTION")

    to_megatron = actions.add_parser(
        "to-megatron",
        help="Hugging Face directory -> Megatron distributed checkpoint",
        example="megatron-coreward convert to-megatron models/Qwen3-8B checkpoints/qwen3-8b --dtype bfloat16",
    )
    to_hf = actions.add_parser(
        "to-hf",
        help="Megatron distributed checkpoint -> Hugging Face directory",
        example="megatron-coreward convert to-hf runs/first/checkpoints/step_000100 models/trained --weights teacher",
    )
    for action, what in ((to_megatron, "Hugging Face directory"), (to_hf, "Megatron checkpoint, or one of a run")):
        action.add_argument("source", type=Path, metavar="SRC", help=what)
        action.add_argument(
            "target",
            type=Path,
            metavar="DST",
            help="directory to write; it must not exist, and appears whole or not at all",
        )
        action.add_argument(
            "--dtype", choices=_DTYPES, help="data type of the written weights; default: that of the source"
        )
        action.add_argument(
            "--workers",
            type=whole(1),
            default=min(8, os.cpu_count() or 1),
            help="number of threads; default: the number of cores, at most 8",
        )
    to_hf.add_argument(
        "--hf-path", type=Path, help="directory with config.json and tokenizer; default: those in the checkpoint"
    )
    to_hf.add_argument(
        "--weights", choices=("policy", "teacher"), default="policy", help="model to take from a run's checkpoint"
    )
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="largest size of a weight file in 10^9 bytes")
    to_megatron.set_defaults(run=_to_megatron)
    to_hf.set_defaults(run=_to_hf)
    _add_verify(actions)


def _add_verify(actions: Any) -> None:
    verify = actions.add_parser(
        "verify",
        help="compare two checkpoints of either kind, or one with its manifest",
        example="megatron-coreward convert verify models/Qwen3-8B checkpoints/qwen3-8b",
    )
    verify.add_argument("one", type=Path, metavar="A", help="a checkpoint of either kind")
    verify.add_argument(
        "other", type=Path, metavar="B", nargs="?", help="another checkpoint; default: the manifest of A"
    )
    verify.add_argument(
        "--hf-path", type=Path, help="directory with the config.json of Megatron checkpoints that have none"
    )
    verify.add_argument(
        "--weights", choices=("policy", "teacher"), default="policy", help="model to take from runs' checkpoints"
    )
    verify.add_argument(
        "--logits", action="store_true", help="also run both models: transformers for HF, Megatron for Megatron"
    )
    verify.set_defaults(run=_verify)


@contextmanager
def _progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (what, BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _to_megatron(options: argparse.Namespace) -> None:
    from megatron_coreward.checkpoint.convert import to_megatron

    with _progress("to Megatron", "bytes") as progress:
        to_megatron(
            options.source,
            options.target,
            dtype=_dtype(options.dtype),
            workers=options.workers,
            progress=progress,
        )
    print(f"done: {options.target}")


def _to_hf(options: argparse.Namespace) -> None:
    from megatron_coreward.checkpoint.convert import to_hf

    if not 0 < options.shard_gb < math.inf:  # NaN is neither
        raise InputError(f"--shard-gb: {options.shard_gb:g}; allowed: above 0")
    with _progress("to Hugging Face", "bytes") as progress:
        to_hf(
            options.source,
            options.target,
            hf_path=options.hf_path,
            weights=options.weights,
            dtype=_dtype(options.dtype),
            shard_bytes=int(options.shard_gb * 1e9),
            workers=options.workers,
            progress=progress,
        )
    print(f"done: {options.target}")


def _verify(options: argparse.Namespace) -> None:
    from megatron_coreward.checkpoint.logits import check_memory, compare_logits
    from megatron_coreward.checkpoint.verify import open_checkpoint, verify

    one = open_checkpoint(options.one, options.hf_path, options.weights)
    other = None
    if options.other is not None:
        other = open_checkpoint(options.other, options.hf_path, options.weights)
    elif options.logits:
        raise InputError("--logits compares two checkpoints; name a second one")
    elif one.manifest is None:
        raise InputError(f"{options.one} has no manifest.json to compare it with; name a second checkpoint")
    if options.logits:
        check_memory(one)
    with _progress("verify", "tensors") as progress:
        found = verify(one, other, progress)
    for line in found.configs:
        say(f"the configs differ: {line}")
    for name, gap in found.different.items():
        say(f"different: {name} (largest absolute difference {gap:.3e})")
    for name in found.not_as_manifest:
        say(f"not as its manifest says: {name}")
    if not found.ok:
        raise RunError(
            f"{len(found.different)} of {found.tensors} tensors differ, {len(found.not_as_manifest)} are not as their "
            f"manifest says, {len(found.configs)} settings differ"
        )
    compared = "equal" if other is not None else "as the manifest says"
    say(f"{found.tensors} tensors are {compared}; manifests checked: {found.manifests}")
    if options.logits and other is not None:
        print(compare_logits(one, other))
