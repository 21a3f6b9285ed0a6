"""How long a weight sync takes, and how many bytes it moves, against the least that is possible.

    python benchmarks/bench_sync.py [--gigabytes 1.0] [--bucket-mib 16] [--only transfer sync bytes] [--json]

Ranks are processes that hold the blocks of an actor layout (no optimizer, so that a model of a gigabyte and more fits).
  transfer   every worker's blocks from the ranks' parameters into the worker's own memory, over shared memory, as a
             multiple of one memcpy of the same bytes in the same run: what this project does.
  sync       the same with vLLM as the receiver, as a multiple of vLLM's own reload of tensors that lie ready in its own
             memory, nobody sending: what a training step pays.
  bytes      what each rank and worker sends and receives over gloo, counted where messages leave and arrive, as a
             multiple of the least: of all together, and of the busiest.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_coreward.config.architecture import Architecture, Experts, read_architecture
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.meeting import serve_store
from megatron_coreward.weights.plan import ModelTensors, plan_transfers
from megatron_coreward.weights.receivers import Receiver, open_receiver
from megatron_coreward.weights.senders import LocalBlock, Sender, open_sender
from megatron_coreward.weights.spec import TransferSpec, tensors_to_send

TIMED = {
    "TP 2 -> TP 1": (ActorLayout(tensor_parallel=2), EngineLayout(1, 1)),
    "TP 1 -> TP 2": (ActorLayout(), EngineLayout(1, 2)),
    "PP 2 -> TP 2": (ActorLayout(pipeline_parallel=2), EngineLayout(1, 2)),
}
COUNTED = {
    "TP 2 x PP 2 -> 2 engines of TP 2": (False, ActorLayout(2, 2), EngineLayout(2, 2)),
    "TP 2 x DP 2 -> 4 engines of TP 1": (False, ActorLayout(2, data_parallel=2), EngineLayout(4, 1)),
    "TP 1 -> 4 engines of TP 1": (False, ActorLayout(), EngineLayout(4, 1)),
    "experts, EP 2 -> TP 2": (True, ActorLayout(data_parallel=2, expert_parallel=2), EngineLayout(1, 2)),
}
LIMIT_S = 600
Pool = ProcessPoolExecutor


# ---- in the processes of ranks, workers and engines ------------------------------------------------------------------

_sender: Sender
_receiver: Receiver
_own: dict[str, torch.Tensor]
_targets: list[list[list[torch.Tensor]]]  # [bucket][message][part]
_engine: RolloutWorker


def open_rank(spec: TransferSpec, arch: Architecture, rank: int) -> None:
    """The blocks of a rank's layout, filled once."""
    global _sender
    torch.set_num_threads(1)
    blocks = {}
    for name, bounds in spec.actor.held(rank, arch):
        if (name, bounds) not in blocks:
            value = torch.randn([b - a for a, b in bounds]).mul_(0.02).to(getattr(torch, spec.dtype))
            index = tuple(slice(*cut) for cut in bounds)
            blocks[name, bounds] = LocalBlock(name, index, lambda value=value: value)
    _sender = open_sender(spec, arch, rank, {"policy": list(blocks.values())}, torch.device("cpu"))


def send(version: int) -> None:
    _sender.send("policy", version)


def close_rank() -> None:
    _sender.close()


def open_worker(spec: TransferSpec, arch: Architecture, engine: int, worker: int) -> None:
    """A worker that does nothing but keep its blocks."""
    global _receiver, _own, _targets
    torch.set_num_threads(1)
    _receiver = open_receiver(spec, arch, engine, worker, torch.device("cpu"))
    needed = {block.name: block.bounds for block in _receiver.schedule.target.needed(worker, arch)}
    dtype = getattr(torch, spec.dtype)
    _own = {name: torch.ones([b - a for a, b in bounds], dtype=dtype) for name, bounds in needed.items()}

    def target(name: str, bounds: Any) -> torch.Tensor:
        cuts = zip(bounds, needed[name], strict=True)
        return _own[name][tuple(slice(a - first, b - first) for (a, b), (first, _) in cuts)]

    _targets = [[[target(*part) for part in m.parts] for m in bucket] for bucket in _receiver.messages]


def receive(version: int) -> None:
    for arrived, targets in zip(_receiver.receive(version), _targets, strict=True):
        for (_, payload), of_message in zip(arrived, targets, strict=True):
            first = 0
            for part in of_message:
                part.copy_(payload[first : first + part.numel()].view(part.shape))
                first += part.numel()


def counted(what: str) -> tuple[int, int]:
    """Bytes that a rank or a worker has sent and received."""
    group: Any = (_sender if what == "rank" else _receiver).group  # type: ignore[attr-defined]
    return group.bytes_sent, group.bytes_received


def start_engine(folder: Path, dtype: Any, tensor_parallel: int) -> None:
    global _engine
    sizes: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_gib": 0.125}
    _engine = RolloutWorker(EngineSetup(folder, dtype, tensor_parallel=tensor_parallel, **sizes))


def engine_call(method: str, *args: Any) -> Any:
    return _engine.shutdown() if method == "shutdown" else _engine.run(method, *args)


def make_ready(worker: Any, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """In a worker of an engine: all tensors of the checkpoint, in memory."""
    worker.ready = {name: torch.ones(shape, dtype=getattr(torch, dtype)).mul_(0.02) for name, shape in shapes.items()}


def reload(worker: Any) -> None:
    """vLLM's own reload of tensors that lie ready."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    engine = worker.weight_transfer_engine
    initialize_layerwise_reload(engine.model)
    engine.model.load_weights(iter(worker.ready.items()))
    finalize_layerwise_reload(engine.model, engine.model_config)


def in_workers(function: Callable[..., Any], *args: Any) -> None:
    _engine._engine._llm.collective_rpc(function, args=args)


# ---- the benchmark ---------------------------------------------------------------------------------------------------


class Processes:
    """Processes of their own, each of which does one thing after the other."""

    def __init__(self) -> None:
        self._pools: list[Pool] = []

    def start(self, count: int) -> list[Pool]:
        context = multiprocessing.get_context("spawn")
        made = [ProcessPoolExecutor(1, mp_context=context) for _ in range(count)]
        self._pools += made
        return made

    def stop(self) -> None:
        for pool in self._pools:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools = []


def finish(futures: Sequence["Future[Any]"]) -> list[Any]:
    return [future.result(LIMIT_S) for future in futures]


def memcpy_seconds(nbytes: int) -> float:
    """Seconds to copy this many bytes on one thread into memory that is there already: the fastest of five copies."""
    torch.set_num_threads(1)
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return timed(lambda _: target.copy_(source), 5)


def timed(function: Callable[[int], Any], repeats: int) -> float:
    """The fastest, in seconds; the first one meets untouched memory and is left out."""
    seconds = []
    for version in range(1, repeats + 2):
        begin = time.perf_counter()
        function(version)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def spec_of(transport: Any, actor: ActorLayout, engines: EngineLayout, options: Any, port: int) -> TransferSpec:
    name = f"bench-{os.getpid()}-{time.monotonic_ns()}"
    spec = TransferSpec(transport, name, actor, engines, options.dtype, int(options.bucket_mib * 2**20), 300.0)
    return spec.at("127.0.0.1", port)


def open_ranks(processes: Processes, spec: TransferSpec, arch: Architecture) -> list[Pool]:
    ranks = processes.start(spec.actor.world_size)
    finish([pool.submit(open_rank, spec, arch, rank) for rank, pool in enumerate(ranks)])
    return ranks


def measure_transfer(arch: Architecture, case: str, options: Any, port: int) -> float:
    """Seconds from parameters into the workers' own memory."""
    actor, engines = TIMED[case]
    processes, spec = Processes(), spec_of("shared_memory", actor, engines, options, port)
    try:
        ranks = open_ranks(processes, spec, arch)
        workers = processes.start(engines.num_workers)
        finish([pool.submit(open_worker, spec, arch, 0, worker) for worker, pool in enumerate(workers)])

        def transfer(version: int) -> None:
            finish([pool.submit(receive, version) for pool in workers] + [pool.submit(send, version) for pool in ranks])

        seconds = timed(transfer, options.repeats)
        finish([pool.submit(close_rank) for pool in ranks])
        return seconds
    finally:
        processes.stop()


def measure_sync(folder: Path, arch: Architecture, case: str, options: Any, port: int) -> tuple[float, float]:
    """Seconds of a whole sync, and of vLLM's own reload in the same engine."""
    actor, engines = TIMED[case]
    processes, spec = Processes(), spec_of("shared_memory", actor, engines, options, port)
    try:
        (engine,) = processes.start(1)
        engine.submit(start_engine, folder, options.dtype, engines.tensor_parallel).result(LIMIT_S)
        ranks = open_ranks(processes, spec, arch)

        def sync(version: int) -> None:
            receiving = engine.submit(engine_call, "receive_weights", spec.to_json(), 0, version)
            finish([*(pool.submit(send, version) for pool in ranks), receiving])

        seconds = timed(sync, options.repeats)
        shapes = {meta.name: meta.shape for meta in tensors_to_send(arch, options.dtype)}
        engine.submit(in_workers, make_ready, shapes, options.dtype).result(LIMIT_S)
        alone = timed(lambda _: engine.submit(in_workers, reload).result(LIMIT_S), options.repeats)
        finish([pool.submit(close_rank) for pool in ranks])
        engine.submit(engine_call, "shutdown").result(LIMIT_S)
        return seconds, alone
    finally:
        processes.stop()


def count_bytes(case: str, options: Any, port: int) -> dict[str, float]:
    """Of one weight sync over gloo, on processes of their own."""
    moe, actor, engines = COUNTED[case]
    sizes = {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64, "ffn_size": 1536}
    more = {"vocab_size": 4096, "max_position": 128, "tied": False, "qkv_bias": False, "qk_norm": True}
    rope: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-6}
    experts = Experts(8, 2, 512, True) if moe else None
    family = "qwen3_moe" if moe else "qwen3"
    arch = Architecture(family=family, experts=experts, **sizes, **more, **rope)  # type: ignore[arg-type]
    processes, spec = Processes(), spec_of("gloo", actor, engines, options, port)
    plan = plan_transfers(actor, engines, ModelTensors(arch, options.dtype))
    try:
        ranks = open_ranks(processes, spec, arch)
        places = [(engine, worker) for engine in range(engines.num_engines) for worker in range(engines.num_workers)]
        workers = processes.start(len(places))
        finish([pool.submit(open_worker, spec, arch, *place) for place, pool in zip(places, workers, strict=True)])
        finish([pool.submit(receive, 1) for pool in workers] + [pool.submit(send, 1) for pool in ranks])
        of_ranks = finish([pool.submit(counted, "rank") for pool in ranks])
        of_workers = finish([pool.submit(counted, "worker") for pool in workers])
        total = sum(received for _, received in of_workers)
        assert total == sum(sent for sent, _ in (*of_ranks, *of_workers))
        busiest = max(max(both) for both in (*of_ranks, *of_workers))
        return {
            "total_over_minimum": total / plan.total_bytes,
            "busiest_over_minimum": busiest / plan.least_busiest_bytes,
            "gigabytes": total / 1e9,
        }
    finally:
        processes.stop()


def write_benchmark_model(folder: Path, gigabytes: float) -> Architecture:
    sizes = {"hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "ffn": 3072}
    write_model(folder, byte_level_tokenizer(), layers=1, **sizes)
    # a layer has 12.6 million parameters; the vocabulary stays small, so that the layers are what is measured
    layers = max(2, round(gigabytes * 1e9 / 2 / 12.6e6 / 2) * 2)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    config |= {"layer_types": ["full_attention"] * layers} if "layer_types" in config else {}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    return read_architecture(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--bucket-mib", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=tuple(TIMED), action="append", help="of those that are timed")
    parser.add_argument(
        "--only", choices=("transfer", "sync", "bytes"), nargs="+", default=["transfer", "sync", "bytes"]
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object: the worst case of each figure")
    options = parser.parse_args()
    options.dtype = "bfloat16"
    found: dict[str, Any] = {"cases": {}}

    def report(case: str, figures: dict[str, float]) -> None:
        found["cases"].setdefault(case, {}).update(figures)
        for key in ("transfer_over_memcpy", "sync_over_reload", "busiest_over_minimum", "total_over_minimum"):
            if key in figures:
                found[key] = max(found.get(key, 0.0), figures[key])
        print(f"{case}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}", flush=True)

    store = serve_store("127.0.0.1", 300)
    with tempfile.TemporaryDirectory() as name:
        arch = write_benchmark_model(Path(name), options.gigabytes)
        nbytes = sum(meta.nbytes for meta in tensors_to_send(arch, options.dtype))
        memcpy = memcpy_seconds(nbytes)
        found |= {"gigabytes": nbytes / 1e9, "memcpy_s": memcpy, "bucket_mib": options.bucket_mib}
        print(f"{nbytes / 1e9:.2f} GB {options.dtype}; one memcpy: {memcpy:.3f} s ({nbytes / 1e9 / memcpy:.1f} GB/s)")
        for case in options.case or TIMED:
            if "transfer" in options.only:
                seconds = measure_transfer(arch, case, options, store.port)
                report(case, {"transfer_over_memcpy": seconds / memcpy, "transfer_s": seconds})
            if "sync" in options.only:
                seconds, alone = measure_sync(Path(name), arch, case, options, store.port)
                report(case, {"sync_over_reload": seconds / alone, "sync_s": seconds, "reload_s": alone})
    if "bytes" in options.only:
        for case in COUNTED:
            report(case, count_bytes(case, options, store.port))
    if options.json:
        print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
