"""Runs a function on several gloo ranks in processes of their own, and brings back what each returned.

The ranks are forked from one process that has imported torch and Megatron and has done nothing else: for most tests
these imports, seconds of each rank, would be most of the work.
"""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from megatron_coreward.weights.ports import free_port

__all__ = ["free_port", "run_ranks"]

# Once, for all ranks of all tests; the last one is what torch's optimizers import in their first step.
IMPORTED = ["megatron_coreward.actor.actor", "tests.actor.on_ranks", "torch._dynamo"]


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """`function(rank, *args)` on every rank; results in rank order. The first error of a rank is raised here.

    `function` must be importable by name: it lives in a module, not in a test.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("forkserver")
        root = str(Path(__file__).parents[2])
        if root not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, paths)])
        context.set_forkserver_preload(IMPORTED)  # in effect when its process starts, at the first call
        processes = [
            context.Process(target=_entry, args=(rank, Path(folder), function, args)) for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout_s)
        finally:
            late = [i for i, process in enumerate(processes) if process.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        failures = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        if failures:
            raise AssertionError(failures[0])
        if late:
            raise AssertionError(f"ranks {late} were not done after {timeout_s} s")
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(num_ranks)]


def _entry(rank: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        (folder / f"{rank}.result").write_bytes(pickle.dumps(function(rank, *args)))
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
