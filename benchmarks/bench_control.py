"""What the driver itself costs: a training step's control time and memory at thousands of ranks.

    python benchmarks/bench_control.py [--json] [--picture docs/control_cost.png]
    python benchmarks/bench_control.py --json --ranks 4096 --sequences 65536 --buckets 525      # one row

The driver is the real one, `Trainer.step` over `ActorGroup`, `EngineGroup` and `WeightSync`, and so is Ray: every call
goes to an actor in another process and its answer comes back through the object store. Only the ranks and engines are
not real: `--processes` light actors stand in for all of them, several each, and answer with what was made up before.
The leaders of the replicas and the engines are called; the calls that stand for the lives of all other ranks are there
from the start.

Figures are of the driver's process alone: CPU seconds of the last of two steps, with Ray's threads in it, and the peak
of its resident memory, which counts the parts of the object store that it has read. Every row is a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_coreward.types import Completion, Completions, Problem, Prompt, TokenStats

TENSOR_PARALLEL, PIPELINE_PARALLEL, RANKS_PER_ENGINE = 8, 8, 8
GIB = 2**30
PROMPT_TOKENS, LIMIT_S = 128, 1800
STEPS = 2  # the first one warms up


class Answers:
    """What ranks and engines answer, made up once a shape."""

    def __init__(self, tokens: int, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(tokens // 2, tokens * 3 // 2, 4096)
        self.kept: dict[Any, Any] = {}

    def completion(self, i: int, version: int) -> Completion:
        length = int(self.lengths[i % len(self.lengths)])
        ids = np.full(length, i % 1000, dtype=np.int32)
        text = "so it is " * (length // 3) + f"\\boxed{{{i % 3}}}"
        return Completion(ids, np.full(length, -1.0, dtype=np.float32), text, str(i % 3), "stop", version)

    def of_engine(self, method: str, *arguments: Any) -> Any:
        if method == "receive_weights":
            return np.zeros(len(arguments[-1]) - 1, dtype=np.float32)  # of the canary
        if method != "sample":
            return None
        requests, version = arguments
        key = (len(requests), requests[0].n if requests else 0, version)
        if key not in self.kept:
            made = [[self.completion(7 * q + i, version) for i in range(r.n)] for q, r in enumerate(requests)]
            self.kept[key] = Completions(made)
        return self.kept[key]

    def of_rank(self, method: str, *arguments: Any) -> Any:
        if method == "open_sender":
            return arguments[0].at("127.0.0.1", 1)
        if method == "update":
            names = ["tokens", "clipped", "entropy", "self_certainty", "logprob_gap", "loss/policy", "loss/total"]
            return dict.fromkeys([*names, "max:logprob_gap", "lr", "grad_norm"], 1.0)
        if method != "token_stats":
            return None
        sequences = arguments[0]
        pairs = zip(sequences.lengths, sequences.prompt_lengths, strict=True)
        zeros = [np.zeros(total - int(prompt), dtype=np.float32) for total, prompt in pairs]
        return TokenStats(zeros, zeros, zeros)


class LightActor:
    """`ray.remote(LightActor)`: several leaders and engines in one process."""

    def __init__(self, tokens: int) -> None:
        self._answers = Answers(tokens)

    def run(self, number: int, method: str, *arguments: Any) -> Any:
        return self._answers.of_engine(method, *arguments)

    def lead(self, number: int, method: str, wanted: Any, *arguments: Any) -> dict[int, Any]:
        if wanted is None:
            return {number + i: None for i in range(TENSOR_PARALLEL * PIPELINE_PARALLEL)}
        return {rank: self._answers.of_rank(method, *arguments) for rank in wanted if rank in (0, number)}


class Lives:
    """`ray.remote(Lives)`: one process in which the lives of all ranks that are not called are calls without an end."""

    async def follow(self) -> None:
        import asyncio

        await asyncio.Event().wait()


class Handle:
    """One of the ranks or engines that a light actor stands in for."""

    calls: ClassVar[Counter[str]] = Counter()  # of all

    def __init__(self, actor: Any, number: int) -> None:
        self._actor, self._number = actor, number
        self._actor_id = actor._actor_id

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Method(self, name)


class _Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, method: str, *arguments: Any) -> Any:
        Handle.calls[method] += 1
        return getattr(self._handle._actor, self._name).remote(self._handle._number, method, *arguments)


def make_config(ranks: int, questions: int, n: int) -> Any:
    from megatron_coreward.config.load import parse_config

    data_parallel = max(1, ranks // (TENSOR_PARALLEL * PIPELINE_PARALLEL))
    return parse_config(
        {
            "run_dir": "run",
            "steps": STEPS,
            "method": "co_rewarding_ii",
            "model": {"hf_path": "model"},
            "data": {"train_files": ["train.parquet"], "batch_size": questions},
            "actor": {
                "tensor_parallel": TENSOR_PARALLEL,
                "pipeline_parallel": PIPELINE_PARALLEL,
                "data_parallel": data_parallel,
            },
            "rollout": {
                "num_engines": max(1, ranks // RANKS_PER_ENGINE),
                "tensor_parallel": RANKS_PER_ENGINE,
                "n": n,
                "max_response_tokens": 4096,
            },
            "teacher": {"n": n},
        }
    )


class _Setup:
    """The part of an `ActorSetup` that the group itself reads."""

    def __init__(self, config: Any) -> None:
        self.settings = config.actor


def make_groups(config: Any, tokens: int, processes: int) -> tuple[Any, Any, Any]:
    """The real groups, over light actors."""
    import ray

    from megatron_coreward.actor.relay import replica_of
    from megatron_coreward.cluster.actor_group import ActorGroup
    from megatron_coreward.cluster.engine_group import EngineGroup
    from megatron_coreward.cluster.watchdog import Watchdog
    from megatron_coreward.weights.layouts import ActorLayout

    watchdog = Watchdog()
    light: Any = ray.remote(num_cpus=0)(LightActor)
    actors = [light.remote(tokens) for _ in range(processes)]
    layout = ActorLayout.of(config.actor)
    ranks = object.__new__(ActorGroup)
    ranks.kind, ranks.watchdog, ranks.setup = "actor rank", watchdog, _Setup(config)  # type: ignore[assignment]
    ranks.replicas = [replica_of(layout, dp) for dp in range(layout.data_parallel)]
    ranks.part_of = [layout.place(rank).dp for rank in range(layout.world_size)]
    ranks.output_ranks = tuple(leader for leader, *_ in ranks.replicas)
    ranks._commands = 0
    ranks.workers = [None] * layout.world_size
    for i, leader in enumerate(ranks.output_ranks):
        ranks.workers[leader] = Handle(actors[i % processes], leader)
    lives: Any = ray.remote(num_cpus=0, max_concurrency=2 * layout.world_size)(Lives)
    life = lives.remote()
    for _ in range(layout.world_size - len(ranks.replicas)):
        watchdog.watch_life(life.follow.remote())
    engines = object.__new__(EngineGroup)
    engines.kind, engines.watchdog = "engine", watchdog
    engines.workers = [Handle(actors[i % processes], i) for i in range(config.rollout.num_engines)]
    engines.part_of = range(config.rollout.num_engines)
    engines.sampling_seconds = []
    return ranks, engines, (watchdog, life)


def measure(ranks: int, sequences: int, buckets: int, options: Any) -> dict[str, Any]:
    """One row: the last of `STEPS` steps."""
    import ray

    from megatron_coreward.cluster.rollout_engines import RolloutEngines
    from megatron_coreward.cluster.weight_sync import WeightSync
    from megatron_coreward.rewards.equivalence import AnswerEquivalence
    from megatron_coreward.rewards.methods import METHODS
    from megatron_coreward.telemetry.timing import PhaseTimer
    from megatron_coreward.trainer.checkpoints import CheckpointWriter
    from megatron_coreward.trainer.experience import Collector
    from megatron_coreward.trainer.loop import Trainer
    from megatron_coreward.trainer.schedule import RolloutSchedule
    from megatron_coreward.weights.layouts import EngineLayout
    from megatron_coreward.weights.spec import TransferSpec

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, object_store_memory=3 * GIB, **quiet)
    config = make_config(ranks, sequences // options.n, options.n)
    actors, engines, (watchdog, life) = make_groups(config, options.tokens, options.processes)
    spec = TransferSpec(
        transport="gloo",
        name="bench",
        actor=_layout(config),
        engines=EngineLayout(config.rollout.num_engines, config.rollout.tensor_parallel),
        dtype="bfloat16",
        bucket_bytes=141 * 10**9 // buckets,  # of 70B parameters
        timeout_s=60.0,
    )
    canary = np.arange(64, dtype=np.int32)
    wait = lambda calls: watchdog.get(calls, "weights")  # noqa: E731
    sync = WeightSync(actors, engines, wait, lambda spec, reason: None, spec=spec, canary=canary, max_gap=1.0)
    prompt = Prompt("a question " * 40, np.arange(PROMPT_TOKENS, dtype=np.int32))
    count = sequences // options.n
    problems = [Problem(f"fake/{i}", {"original": prompt}, ground_truth=None, source="fake") for i in range(count)]
    with AnswerEquivalence("exact") as equivalence:
        method = METHODS[config.method]
        schedule = RolloutSchedule(config, method.needs, RolloutEngines(engines, sync), lambda step: problems)
        collector = Collector(config, method, actors, schedule, equivalence, lambda step: problems)
        trainer = Trainer(
            config=config,
            needs=method.needs,
            actors=actors,
            collect=collector.collect,
            checkpoints=CheckpointWriter(config, actors),
        )
        for step in range(1, STEPS + 1):
            Handle.calls.clear()
            timer = PhaseTimer(clock=time.process_time)
            begin, begun = time.process_time(), time.perf_counter()
            trainer.step(step, timer)
            cpu_s, wall_s = time.process_time() - begin, time.perf_counter() - begun
    del life
    ray.shutdown()
    return {
        "ranks": ranks,
        "engines": config.rollout.num_engines,
        "sequences": sequences,
        "buckets": buckets,
        "calls": sum(Handle.calls.values()),
        "cpu_s": cpu_s,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "wall_s": wall_s,
        "phases_s": dict(timer.seconds),
        "calls_by_method": dict(Handle.calls),
    }


def _layout(config: Any) -> Any:
    from megatron_coreward.weights.layouts import ActorLayout

    return ActorLayout.of(config.actor)


def in_own_process(ranks: int, sequences: int, buckets: int, options: Any) -> dict[str, Any]:
    words = [sys.executable, __file__, "--row", str(ranks), str(sequences), str(buckets)]
    for name in ("tokens", "n", "processes"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, stdout=subprocess.PIPE, timeout=LIMIT_S, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def draw(by_ranks: list[dict[str, Any]], by_batch: list[dict[str, Any]], path: Path) -> None:
    """Control time and memory over ranks and over the batch, with the aims."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = ((by_ranks, "ranks", "actor ranks"), (by_batch, "sequences", "sequences a step"))
    rows = (("cpu_s", "control, CPU seconds a step", 1.5), ("memory_gib", "driver memory, GiB", 4.0))
    for place, (points, x, label) in enumerate(columns):
        for line, (y, name, aim) in enumerate(rows):
            plot = axes[line][place]
            plot.plot([p[x] for p in points], [p[y] for p in points], "o-", color="#0072B2")
            plot.axhline(aim, color="#8C8C8C", linestyle="--", linewidth=1)
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            if place == 0:
                plot.set_ylabel(name)
            if line == 1:
                plot.set_xlabel(label)
    axes[0][0].set_title(f"{by_ranks[0]['sequences']:,} sequences")
    axes[0][1].set_title(f"{by_batch[0]['ranks']:,} ranks")
    figure.savefig(path, dpi=120)


def show(row: dict[str, Any]) -> None:
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases_s"].items() if seconds >= 0.01)
    print(
        f"| {row['ranks']:,} | {row['engines']:,} | {row['sequences']:,} | {row['buckets']:,} | {row['calls']:,} | "
        f"{row['cpu_s']:.2f} | {row['memory_gib']:.2f} | {phases} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, help="of the one row that is measured")
    parser.add_argument("--sequences", type=int, help="of the policy, of that row")
    parser.add_argument("--buckets", type=int, help="of a weight sync, of that row")
    parser.add_argument("--tokens", type=int, default=512, help="of a response, on average")
    parser.add_argument("--n", type=int, default=16, help="completions a question, of policy and of teacher each")
    parser.add_argument("--processes", type=int, default=16, help="light actors that stand in for ranks and engines")
    parser.add_argument("--json", action="store_true", help="one JSON object a row instead of a table")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--row", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*options.row, options)))
        return

    def row(ranks: int, sequences: int, buckets: int) -> dict[str, Any]:
        found = in_own_process(ranks, sequences, buckets, options)
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            show(found)
        return found

    if not options.json:
        print("| ranks | engines | sequences | buckets | calls | control, CPU s | memory, GiB | phases, CPU s |")
        print("|---|---|---|---|---|---|---|---|")
    if options.ranks or options.sequences or options.buckets:
        row(options.ranks or 4096, options.sequences or 65536, options.buckets or 525)
        return
    by_ranks = [row(ranks, 65536, 525) for ranks in (64, 512, 4096)]
    by_batch = [row(4096, sequences, 525) for sequences in (1024, 8192)]
    row(4096, 1024, 8)  # as few buckets as anybody would choose
    row(4096, 1024, 1755)  # 235B parameters
    if options.picture is not None:
        draw(by_ranks, [*by_batch, by_ranks[-1]], options.picture)


if __name__ == "__main__":
    main()
