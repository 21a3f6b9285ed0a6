"""How long a weight sync takes, and how many bytes it moves, against the least that is possible.

    python benchmarks/bench_sync.py [--gigabytes 1.0] [--bucket-mib 16] [--only transfer sync bytes tensors] [--json]

Ranks are processes that hold the blocks of an actor layout (no optimizer, so that a model of a gigabyte and more fits).
  transfer   every worker's blocks from the ranks' parameters into the worker's own memory, over shared memory, as a
             multiple of one memcpy of the same bytes in the same run: what this project does.
  sync       the same with vLLM as the receiver, as a multiple of vLLM's own reload of tensors that lie ready in its own
             memory, nobody sending: what a training step pays.
  bytes      what each rank and worker sends and receives over gloo, counted where messages leave and arrive, as a
             multiple of the least: of all together, and of the busiest.
  tensors    what a tensor costs that has hardly any bytes, in microseconds of a core: where a rank packs it, and where
             a worker copies it into its place. A mixture has hundreds of them a layer.

What is compared runs alternately, in memory that has been written before, and a figure is the median of the ratios of
neighbours: whatever else the machine does meets both sides. `transfer_spread` and `sync_spread` are the lowest and the
highest ratio; if they are far apart, the machine was busy.
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
from statistics import median
from typing import Any, NamedTuple

import torch

from megatron_coreward.config.architecture import Architecture, Experts, read_architecture
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.meeting import serve_store
from megatron_coreward.weights.message import parts_of
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
WORST = (  # of whose figures the JSON object has the worst case's
    *("transfer_over_memcpy", "sync_over_reload", "busiest_over_minimum", "total_over_minimum"),
    *("packing_us", "landing_us"),
)
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


def memcpy_of(nbytes: int) -> Callable[[int], Any]:
    """Copies this many bytes on one thread into memory that is there already."""
    torch.set_num_threads(1)
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return lambda _: target.copy_(source)


class Compared(NamedTuple):
    """Two things that were timed alternately."""

    seconds: float  # medians
    reference_s: float
    ratio: float  # the median of the ratios of neighbours
    spread: tuple[float, float]  # the lowest and the highest of them


def compare(function: Callable[[int], Any], reference: Callable[[int], Any], repeats: int) -> Compared:
    """Both in turns; the first time, which meets untouched memory, is left out."""
    pairs = []
    for version in range(1, repeats + 2):
        times = [time.perf_counter()]
        for timed in (function, reference):
            timed(version)
            times.append(time.perf_counter())
        pairs.append((times[1] - times[0], times[2] - times[1]))
    seconds, references = zip(*pairs[1:], strict=True)
    ratios = [a / b for a, b in pairs[1:]]
    return Compared(median(seconds), median(references), median(ratios), (min(ratios), max(ratios)))


def spec_of(transport: Any, actor: ActorLayout, engines: EngineLayout, options: Any, port: int) -> TransferSpec:
    name = f"bench-{os.getpid()}-{time.monotonic_ns()}"
    spec = TransferSpec(transport, name, actor, engines, options.dtype, int(options.bucket_mib * 2**20), 300.0)
    return spec.at("127.0.0.1", port)


def open_ranks(processes: Processes, spec: TransferSpec, arch: Architecture) -> list[Pool]:
    ranks = processes.start(spec.actor.world_size)
    finish([pool.submit(open_rank, spec, arch, rank) for rank, pool in enumerate(ranks)])
    return ranks


def measure_transfer(arch: Architecture, case: str, options: Any, port: int, memcpy: Callable[[int], Any]) -> Compared:
    """From parameters into the workers' own memory, beside one memcpy."""
    actor, engines = TIMED[case]
    processes, spec = Processes(), spec_of("shared_memory", actor, engines, options, port)
    try:
        ranks = open_ranks(processes, spec, arch)
        workers = processes.start(engines.num_workers)
        finish([pool.submit(open_worker, spec, arch, 0, worker) for worker, pool in enumerate(workers)])

        def transfer(version: int) -> None:
            finish([pool.submit(receive, version) for pool in workers] + [pool.submit(send, version) for pool in ranks])

        found = compare(transfer, memcpy, options.repeats)
        finish([pool.submit(close_rank) for pool in ranks])
        return found
    finally:
        processes.stop()


def measure_sync(folder: Path, arch: Architecture, case: str, options: Any, port: int) -> Compared:
    """A whole sync beside vLLM's own reload in the same engine."""
    actor, engines = TIMED[case]
    processes, spec = Processes(), spec_of("shared_memory", actor, engines, options, port)
    try:
        (engine,) = processes.start(1)
        engine.submit(start_engine, folder, options.dtype, engines.tensor_parallel).result(LIMIT_S)
        ranks = open_ranks(processes, spec, arch)

        def sync(version: int) -> None:
            receiving = engine.submit(engine_call, "receive_weights", spec.to_json(), 0, version)
            finish([*(pool.submit(send, version) for pool in ranks), receiving])

        shapes = {meta.name: meta.shape for meta in tensors_to_send(arch, options.dtype)}
        engine.submit(in_workers, make_ready, shapes, options.dtype).result(LIMIT_S)
        found = compare(sync, lambda _: engine.submit(in_workers, reload).result(LIMIT_S), options.repeats)
        finish([pool.submit(close_rank) for pool in ranks])
        engine.submit(engine_call, "shutdown").result(LIMIT_S)
        return found
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


def microseconds_a_tensor(options: Any, port: int) -> dict[str, float]:
    """Of a mixture of tiny experts: the fastest of a few weight syncs in which nobody waits for anybody."""
    from megatron_coreward.weights.receivers.engine import Landing, Places, _Layer
    from megatron_coreward.weights.receivers.landing import Landing as Place
    from megatron_coreward.weights.receivers.landing import Landings

    torch.set_num_threads(1)
    sizes = {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 64}
    more = {"vocab_size": 512, "max_position": 128, "tied": False, "qkv_bias": False, "qk_norm": True}
    rope: dict[str, Any] = {"rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-6}
    arch = Architecture(family="qwen3_moe", experts=Experts(128, 8, 32, True), **sizes, **more, **rope)  # type: ignore[arg-type]
    spec = spec_of("gloo", ActorLayout(), EngineLayout(), options, port)
    open_rank(spec, arch, 0)
    receiver = open_receiver(spec, arch, 0, 0, torch.device("cpu"))
    metas = receiver.schedule.metas
    model = torch.nn.Module()
    landings = Landings({}, [])
    for number, meta in enumerate(metas):
        # As the slices of a stacked parameter: a tensor lands in the second half of one of twice its size.
        memory = torch.zeros(2, *meta.shape, dtype=getattr(torch, options.dtype))
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(memory, requires_grad=False)
        model.add_module(str(number), layer)
        bounds = tuple((0, size) for size in meta.shape)
        place = Place(str(number), "weight", bounds, tuple(memory.stride()[1:]), memory[0].numel())
        landings.of_tensor[meta.name] = [place]
    places = object.__new__(Places)  # without a model of vLLM, whose loaders it would watch
    places.landings, places.sharing = landings, {}
    places.layers = [_Layer(str(number), layer, None) for number, layer in enumerate(model.children())]
    places.number = {layer.name: number for number, layer in enumerate(places.layers)}
    landing = Landing(places, receiver, torch.device("cpu"))
    memories = [[torch.ones(m.nbytes, dtype=torch.uint8) for m in bucket] for bucket in receiver.messages]
    payloads = [
        [parts_of(memory, m, _sender._dtype) for memory, m in zip(of_bucket, bucket, strict=True)]
        for of_bucket, bucket in zip(memories, receiver.messages, strict=True)
    ]

    def pack() -> None:
        for bucket, of_bucket in enumerate(memories):
            write = _sender._packer("policy", 1, bucket)
            for number, memory in enumerate(of_bucket):
                write(number, memory)

    def land() -> None:
        landing.begin()
        for bucket, arrived in enumerate(payloads):
            landing.land(bucket, arrived)
        landing.end()

    found = {"tensors": float(len(metas))}
    for name, function in (("packing_us", pack), ("landing_us", land)):
        seconds = []
        for _ in range(options.repeats + 1):
            begin = time.thread_time()  # of the CPU
            function()
            seconds.append(time.thread_time() - begin)
        found[name] = min(seconds[1:]) / len(metas) * 1e6
    receiver.close()
    close_rank()
    return found


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
        "--only",
        choices=("transfer", "sync", "bytes", "tensors"),
        nargs="+",
        default=["transfer", "sync", "bytes", "tensors"],
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object: the worst case of each figure")
    options = parser.parse_args()
    options.dtype = "bfloat16"
    found: dict[str, Any] = {"cases": {}}

    def report(case: str, figures: dict[str, Any]) -> None:
        found["cases"].setdefault(case, {}).update(figures)
        for key in WORST:
            if key in figures:
                found[key] = max(found.get(key, 0.0), figures[key])
        shown = [
            f"{name} {' to '.join(f'{number:.3f}' for number in (value if isinstance(value, tuple) else (value,)))}"
            for name, value in figures.items()
        ]
        print(f"{case}: {', '.join(shown)}", flush=True)

    store = serve_store("127.0.0.1", 300)
    with tempfile.TemporaryDirectory() as name:
        arch = write_benchmark_model(Path(name), options.gigabytes)
        nbytes = sum(meta.nbytes for meta in tensors_to_send(arch, options.dtype))
        found |= {"gigabytes": nbytes / 1e9, "bucket_mib": options.bucket_mib}
        print(f"{nbytes / 1e9:.2f} GB {options.dtype}, buckets of {options.bucket_mib:g} MiB", flush=True)
        memcpy = memcpy_of(nbytes) if "transfer" in options.only else None
        for case in options.case or TIMED:
            if memcpy is not None:
                figures = measure_transfer(arch, case, options, store.port, memcpy)._asdict()
                names = ("transfer_s", "memcpy_s", "transfer_over_memcpy", "transfer_spread")
                report(case, dict(zip(names, figures.values(), strict=True)))
            if "sync" in options.only:
                figures = measure_sync(Path(name), arch, case, options, store.port)._asdict()
                names = ("sync_s", "reload_s", "sync_over_reload", "sync_spread")
                report(case, dict(zip(names, figures.values(), strict=True)))
    if "bytes" in options.only:
        for case in COUNTED:
            report(case, count_bytes(case, options, store.port))
    if "tensors" in options.only:
        report("a mixture of 128 experts a layer", microseconds_a_tensor(options, store.port))
    if options.json:
        print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
