"""What commands share that ask vLLM engines outside of training: their options, and a bar while they answer."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_coreward.commands.arguments import number, whole

if TYPE_CHECKING:
    from megatron_coreward.evaluation.evaluate import Engines


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-engines", type=whole(1), default=1, help="number of vLLM engines")
    parser.add_argument("--tensor-parallel", type=whole(1), default=1, help="number of GPUs of each engine")
    parser.add_argument(
        "--kv-cache-gib",
        type=number(above=0),
        default=1.0,
        help="size of the key-value cache of each engine rank on a machine without GPUs",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=number(above=0, most=1),
        default=0.9,
        help="share of a GPU's memory that an engine takes",
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="switch thinking on or off for models that have it, such as Qwen3; default: the chat template's",
    )


def chosen_engines(options: argparse.Namespace, **more: Any) -> "Engines":
    """The engines that the options describe; `more` are further fields of theirs."""
    from megatron_coreward.evaluation.evaluate import Engines

    return Engines(
        num_engines=options.num_engines,
        tensor_parallel=options.tensor_parallel,
        kv_cache_gib=options.kv_cache_gib,
        gpu_memory_utilization=options.gpu_memory_utilization,
        **more,
    )


@contextmanager
def answering(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, which the yielded function moves to (done, total). Ray ends with it."""
    from tqdm import tqdm

    from megatron_coreward.cluster.ray_start import stop_ray

    with tqdm(desc=what, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            yield progress
        finally:
            stop_ray()
