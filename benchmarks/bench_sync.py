"""How long a weight sync takes, against one memcpy of the same bytes in the same run.

    python benchmarks/bench_sync.py [--gigabytes 1.0] [--transport shared_memory] [--repeats 5]

Ranks are processes that hold the blocks of an actor layout (no optimizer, so that a model of a gigabyte and more fits).
Three figures for each of TP 2 -> TP 1, TP 1 -> TP 2 and PP 2 -> TP 2, each as a multiple of the memcpy:
  transfer     every worker's blocks from the ranks' parameters into the worker's own memory, through the transport, in
               buckets, writing and reading overlapped: what this project does.
  sync         the same with vLLM as the receiver: what a training step pays. vLLM lays every linear layer out anew for
               its CPU kernels, and copies it twice on the way.
  vLLM alone   vLLM taking in buckets that lie ready in shared memory, nobody writing: what no transport can save.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.weights.buckets import SegmentLayout
from megatron_coreward.weights.gloo import GlooSender, Inbox, Session, serve_store
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import Params
from megatron_coreward.weights.route import tensors_to_send
from megatron_coreward.weights.segment import open_segment, tensor_at
from megatron_coreward.weights.send import LocalBlock, Sender, SharedMemorySender

CASES = {
    "TP 2 -> TP 1": (ActorLayout(tensor_parallel=2), 1),
    "TP 1 -> TP 2": (ActorLayout(), 2),
    "PP 2 -> TP 2": (ActorLayout(pipeline_parallel=2), 2),
}
DTYPE = "bfloat16"
LIMIT_S = 600

Pool = ProcessPoolExecutor

_sender: Sender
_store: Any
_engine: RolloutWorker


def _start_rank(
    rank: int, session: Session, transport: str, segment: str, port: int | None, num_slots: int
) -> tuple[dict[str, Any], int]:
    """In a rank's process: the blocks of its layout, filled once."""
    global _sender, _store
    torch.set_num_threads(1)
    arch = session.params.arch
    held: list[LocalBlock] = []
    taken: set[tuple[str, Any]] = set()
    for name, bounds in session.actor.held(rank, arch):
        if (name, bounds) in taken:
            continue
        taken.add((name, bounds))
        block = torch.randn([stop - start for start, stop in bounds]).mul_(0.02).bfloat16()
        held.append(LocalBlock(name, tuple(slice(*cut) for cut in bounds), lambda block=block: block))
    _store = None
    if transport == "gloo":
        if rank == 0:
            _store = serve_store("127.0.0.1", 120)
            port = _store.port
        object.__setattr__(session, "port", port)
        _sender = GlooSender(held, session, rank, _store)
    else:
        owned = [block for block in held if rank == 0 or _first_holder(session, block) == rank]
        _sender = SharedMemorySender(
            owned, session.metas, session.bucket_bytes, segment, rank, session.actor.world_size, num_slots
        )
    return _sender.init_info, session.port


def _first_holder(session: Session, wanted: LocalBlock) -> int:
    bounds = tuple((cut.start, cut.stop) for cut in wanted.index)
    for rank in range(session.actor.world_size):
        if any(held == (wanted.name, bounds) for held in session.actor.held(rank, session.params.arch)):
            return rank
    raise AssertionError


def _write(bucket: int, version: int) -> None:
    _sender.write(bucket, version)


def _close() -> None:
    _sender.close()


_session: Session
_needed: dict[str, tuple[slice, ...]]
_own: dict[str, torch.Tensor]
_layout: SegmentLayout
_inbox: Inbox


def _start_worker(session: Session, worker: int, info: dict[str, Any], transport: str) -> None:
    """In the process of a worker that does nothing but keep its blocks."""
    global _session, _needed, _own, _layout, _inbox
    _session = session
    torch.set_num_threads(1)
    arch = session.params.arch
    _needed = {n: tuple(slice(*cut) for cut in bounds) for n, bounds in session.engines.needed(worker, arch)}
    shapes = {n: [cut.stop - cut.start for cut in index] for n, index in _needed.items()}
    _own = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    if transport == "gloo":
        object.__setattr__(session, "port", info["port"])
        _inbox = Inbox(session, 0, worker)
        _inbox._first_update = False  # its filling with NaN is no part of an update
    else:
        _layout = SegmentLayout.from_json(info)


def _worker_begin(transport: str) -> None:
    if transport == "gloo":
        _inbox.begin()


def _worker_take(bucket: int, version: int, transport: str) -> None:
    if transport == "gloo":
        memory, start = _inbox.take(bucket, version), 0
    else:
        memory, start = _segment(), _layout.slot_start(bucket)
    for entry in _session.buckets[bucket].entries:
        if entry.meta.name in _needed:
            tensor = tensor_at(memory, start + entry.offset, entry.meta)
            _own[entry.meta.name].copy_(tensor[_needed[entry.meta.name]])


@cache
def _segment() -> Any:
    return open_segment(_layout, writable=True)


def _worker_end(transport: str) -> None:
    if transport == "gloo":
        _inbox.end()


def _start_engine(folder: Path, transport: str, tensor_parallel: int) -> None:
    global _engine
    _engine = RolloutWorker(
        folder,
        dtype=DTYPE,
        tensor_parallel=tensor_parallel,
        max_model_len=128,
        max_num_seqs=4,
        kv_cache_gib=0.125,
        weight_transfer=transport,
    )


def _engine_call(method: str, *args: Any) -> Any:
    return getattr(_engine, method)(*args)


def memcpy_seconds(nbytes: int) -> float:
    """One copy of so many bytes by one thread into memory that is there already; the median of five."""
    torch.set_num_threads(1)
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def transfer(
    senders: Sequence[Pool], receivers: Sequence[Pool], buckets: int, version: int, take: Callable[[Pool, int], Any]
) -> None:
    """The trainer's order: while the receivers take one bucket, the ranks write the next."""
    taking: list[Any] = []
    for bucket in range(buckets):
        writing = [pool.submit(_write, bucket, version) for pool in senders]
        for future in [*writing, *taking]:
            future.result(LIMIT_S)
        taking = [take(pool, bucket) for pool in receivers]
    for future in taking:
        future.result(LIMIT_S)


def everywhere(pools: Sequence[Pool], function: Callable[..., Any], *args: Any) -> None:
    for future in [pool.submit(function, *args) for pool in pools]:
        future.result(LIMIT_S)


def measure(
    folder: Path, arch: Architecture, actor: ActorLayout, tensor_parallel: int, options: Any
) -> dict[str, float]:
    """Medians, in seconds; the first of each series meets untouched memory and is left out."""
    session = Session(
        address="127.0.0.1",
        port=0,
        timeout_s=120.0,
        actor=actor,
        engines=EngineLayout(1, tensor_parallel),
        params=Params(arch, DTYPE),
        bucket_bytes=int(options.bucket_mib * 2**20),
    )
    buckets, context, way = len(session.buckets), multiprocessing.get_context("spawn"), options.transport
    pools: list[Pool] = []

    def start(count: int) -> list[Pool]:
        made = [ProcessPoolExecutor(1, mp_context=context) for _ in range(count)]
        pools.extend(made)
        return made

    def open_ranks(ranks: Sequence[Pool], num_slots: int) -> dict[str, Any]:
        info, port = {}, None
        for rank, pool in enumerate(ranks):
            arguments = (rank, session, way, f"bench-{os.getpid()}", port, num_slots)
            found, port = pool.submit(_start_rank, *arguments).result(LIMIT_S)
            info = info or found
        return info

    def timed(function: Callable[[int], None]) -> float:
        seconds = []
        for version in range(1, options.repeats + 2):
            begin = time.perf_counter()
            function(version)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds[1:])

    try:
        ranks = start(actor.world_size)
        info = open_ranks(ranks, 2)
        workers = start(tensor_parallel)
        for worker, pool in enumerate(workers):
            pool.submit(_start_worker, session, worker, info, way).result(LIMIT_S)

        def plain(version: int) -> None:
            everywhere(workers, _worker_begin, way)
            transfer(ranks, workers, buckets, version, lambda p, b: p.submit(_worker_take, b, version, way))
            everywhere(workers, _worker_end, way)

        figures = {"transfer": timed(plain)}
        stop(workers)
        everywhere(ranks[::-1], _close)
        info = open_ranks(ranks, 2)
        (engine,) = start(1)
        engine.submit(_start_engine, folder, way, tensor_parallel).result(LIMIT_S)

        def sync(version: int) -> None:
            everywhere([engine], _engine_call, "start_update", info)
            transfer(ranks, [engine], buckets, version, lambda p, b: p.submit(_engine_call, "load_bucket", b, version))
            everywhere([engine], _engine_call, "finish_update", version)

        figures["sync"] = timed(sync)
        if way == "shared_memory":
            everywhere(ranks[::-1], _close)
            info = open_ranks(ranks, buckets)
            for bucket in range(buckets):
                everywhere(ranks, _write, bucket, 0)

            def alone(version: int) -> None:
                everywhere([engine], _engine_call, "start_update", info)
                for bucket in range(buckets):
                    everywhere([engine], _engine_call, "load_bucket", bucket, 0)
                everywhere([engine], _engine_call, "finish_update", version)

            figures["vLLM alone"] = timed(alone)
        everywhere([engine], _engine_call, "shutdown")
        everywhere(ranks[::-1], _close)
        return figures
    finally:
        stop(pools)


def stop(pools: Sequence[Pool]) -> None:
    for pool in pools:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--bucket-mib", type=float, default=128.0)
    parser.add_argument("--transport", choices=("shared_memory", "gloo"), default="shared_memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=tuple(CASES), action="append")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "ffn": 3072}
        write_model(folder, byte_level_tokenizer(), layers=1, **sizes)
        # a layer has 12.6 million parameters; the vocabulary stays small, so that the layers are what is measured
        layers = max(2, round(options.gigabytes * 1e9 / 2 / 12.6e6 / 2) * 2)
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
        config |= {"layer_types": ["full_attention"] * layers} if "layer_types" in config else {}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").unlink()
        arch = read_architecture(folder)
        nbytes = sum(meta.nbytes for meta in tensors_to_send(arch, DTYPE))
        memcpy = memcpy_seconds(nbytes)
        print(
            f"{nbytes / 1e9:.2f} GB {DTYPE}, {options.transport}; "
            f"one memcpy: {memcpy:.3f} s ({nbytes / 1e9 / memcpy:.1f} GB/s)"
        )
        for case in options.case or CASES:
            figures = measure(folder, arch, *CASES[case], options)
            parts = [f"{name} {value / memcpy:.2f} x ({value:.3f} s)" for name, value in figures.items()]
            print(f"{case}: {', '.join(parts)}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
