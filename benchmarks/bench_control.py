"""What the driver itself costs: a training step's control time and memory at thousands of ranks.

    python benchmarks/bench_control.py [--tokens 512] [--buckets 8] [--ray] [--picture docs/control_cost.png]

The driver is the real one: `Trainer.step` over `ActorGroup`, `EngineGroup` and `WeightSync`. Ranks and engines are not:
a call serialises its arguments and results as Ray does (pickle; arrays are copied once, beside it, and read where they
lie), and costs no time otherwise. What the stand-ins take to make up their answers is left out. Time is that of the
driver's CPU, so that a busy machine gives the same figures; the driver is one thread. Every row is a process of its
own, and memory is its peak resident set.

With --ray, what a call to an actor costs the driver is measured on a real Ray, and its product with
the calls of a step is printed below the table: the stand-ins leave it out.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_coreward.cluster import engine_group, worker_group
from megatron_coreward.cluster.actor_group import ActorGroup
from megatron_coreward.cluster.engine_group import EngineGroup
from megatron_coreward.cluster.rollout_engines import RolloutEngines
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.cluster.weight_sync import WeightSync
from megatron_coreward.config.load import parse_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.rewards.equivalence import AnswerEquivalence
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.telemetry.timing import PhaseTimer
from megatron_coreward.trainer.checkpoints import CheckpointWriter
from megatron_coreward.trainer.experience import Collector
from megatron_coreward.trainer.loop import Trainer
from megatron_coreward.trainer.schedule import RolloutSchedule
from megatron_coreward.types import Completion, Completions, Problem, Prompt, TokenStats
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.route import Route

TENSOR_PARALLEL, PIPELINE_PARALLEL, RANKS_PER_ENGINE = 8, 8, 8
MIB, GIB = 2**20, 2**30
PROMPT_TOKENS, LIMIT_S = 128, 900
STEPS = 2  # the first one warms up


@dataclass(frozen=True, eq=False)
class Sent:
    """An object on its way: a pickle, and the arrays beside it."""

    pickled: bytes
    arrays: list[bytes]

    @property
    def num_bytes(self) -> int:
        return len(self.pickled) + sum(map(len, self.arrays))


def dump(value: Any) -> Sent:
    arrays: list[bytes] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: arrays.append(bytes(buffer.raw())))
    return Sent(pickled, arrays)


def load(sent: Sent) -> Any:
    return pickle.loads(sent.pickled, buffers=sent.arrays)


@dataclass
class World:
    """Stands in for Ray: what is put or returned is serialised, and is made into objects again where it is read."""

    calls: int = 0
    sent_bytes: int = 0
    away_s: float = 0.0  # in the stand-ins, not in the driver
    by_method: Counter[str] = field(default_factory=Counter)

    def put(self, value: Any) -> Sent:
        data = dump(value)
        self.sent_bytes += data.num_bytes
        return data

    def get(self, results: Any, *ignored: Any, **also_ignored: Any) -> Any:
        return [load(result) for result in results]


@dataclass
class Worker:
    """An actor rank or an engine: `worker.run.remote(method, *arguments)`."""

    world: World
    answer: Any  # (method, arguments) -> the serialised result

    @property
    def run(self) -> "Remote":
        return Remote(self)


@dataclass
class Remote:
    worker: Worker

    def remote(self, method: str, *arguments: Any) -> Sent:
        world = self.worker.world
        world.calls += 1
        world.by_method[method] += 1
        # What was put is sent as a reference.
        world.put([a for a in arguments if not isinstance(a, Sent)])
        begin = time.process_time()
        result: Sent = self.worker.answer(method, arguments)
        world.away_s += time.process_time() - begin
        return result


class Answers:
    """What ranks and engines say, made up once a shape."""

    def __init__(self, tokens: int, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(tokens // 2, tokens * 3 // 2, 4096)
        self.kept: dict[Any, Sent] = {}
        self.nothing = dump(None)

    def completion(self, i: int, version: int) -> Completion:
        length = int(self.lengths[i % len(self.lengths)])
        ids = np.full(length, i % 1000, dtype=np.int32)
        text = "so it is " * (length // 3) + f"\\boxed{{{i % 3}}}"
        return Completion(ids, np.full(length, -1.0, dtype=np.float32), text, str(i % 3), "stop", version)

    def engine(self, method: str, arguments: tuple[Any, ...]) -> Sent:
        if method == "score":
            return dump(np.zeros(len(arguments[0]) - 1, dtype=np.float32))
        if method != "sample":
            return self.nothing
        requests, version = arguments
        if not requests:
            return dump(Completions())
        key = ("sample", len(requests), requests[0].n, version)
        if key not in self.kept:
            made = [[self.completion(7 * q + i, version) for i in range(r.n)] for q, r in enumerate(requests)]
            self.kept[key] = dump(Completions(made))
        return self.kept[key]

    def rank(self, last_stage: bool) -> Any:
        def answer(method: str, arguments: tuple[Any, ...]) -> Sent:
            if method == "write_bucket":
                return dump([])
            if method == "open_sender":
                return dump({})
            if not last_stage or method not in ("token_stats", "update"):
                return self.nothing
            if method == "update":
                names = ["tokens", "clipped", "entropy", "self_certainty", "logprob_gap", "loss/policy", "loss/total"]
                return dump(dict.fromkeys([*names, "max:logprob_gap", "lr", "grad_norm"], 1.0))
            sequences = load(arguments[0])
            pairs = zip(sequences.lengths, sequences.prompt_lengths, strict=True)
            zeros = [np.zeros(total - int(prompt), dtype=np.float32) for total, prompt in pairs]
            return dump(TokenStats(zeros, zeros, zeros))

        return answer


def make_config(ranks: int, questions: int, n: int) -> RunConfig:
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

    def __init__(self, config: RunConfig) -> None:
        self.settings = config.actor


def make_actors(config: RunConfig, world: World, answers: Answers) -> ActorGroup:
    """The real group over stand-ins, in the order of Megatron's ranks: tensor, data, pipeline."""
    group = object.__new__(ActorGroup)
    dp, stages = config.actor.data_parallel, PIPELINE_PARALLEL
    places = [(d, p, t) for p in range(stages) for d in range(dp) for t in range(TENSOR_PARALLEL)]
    group.setup = _Setup(config)  # type: ignore[assignment]
    group.watchdog = world  # type: ignore[assignment]
    group.workers = [Worker(world, answers.rank(p == stages - 1 and t == 0)) for _, p, t in places]
    group.part_of = [d for d, _, _ in places]
    group.output_ranks = tuple(i for i, (_, p, t) in enumerate(places) if p == stages - 1 and t == 0)
    return group


def make_engines(config: RunConfig, world: World, answers: Answers) -> EngineGroup:
    group = object.__new__(EngineGroup)
    group.watchdog = world  # type: ignore[assignment]
    group.workers = [Worker(world, answers.engine) for _ in range(config.rollout.num_engines)]
    group.part_of = range(config.rollout.num_engines)
    group.sampling_seconds = []
    return group


def measure(ranks: int, questions: int, n: int, tokens: int, buckets: int) -> dict[str, Any]:
    """One row: the last of `STEPS` steps."""
    world, answers = World(), Answers(tokens)
    for module in (engine_group, worker_group):  # they are this process's own: `ray.put` of arguments
        module.ray = world  # type: ignore[attr-defined]
    config = make_config(ranks, questions, n)
    actors, engines = make_actors(config, world, answers), make_engines(config, world, answers)
    route = Route("shared_memory", "bench", 256 * MIB, EngineLayout(), 60.0)
    sync = WeightSync(
        actors, engines, world.get, route=route, num_buckets=buckets, canary=np.arange(64, dtype=np.int32), max_gap=1.0
    )
    prompt = Prompt("a question " * 40, np.arange(PROMPT_TOKENS, dtype=np.int32))
    problems = [Problem(f"fake/{i}", {"original": prompt}, ground_truth=None, source="fake") for i in range(questions)]
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
            world.calls, world.sent_bytes, world.away_s = 0, 0, 0.0
            world.by_method.clear()
            timer = PhaseTimer(clock=lambda: time.process_time() - world.away_s)
            trainer.step(step, timer)
            seconds = timer.metrics()["step_time_s"]
    return {
        "ranks": ranks,
        "sequences": questions * n,
        "control_s": seconds,
        "phases_s": dict(timer.seconds),
        "calls": world.calls,
        "bucket_calls": world.by_method["write_bucket"] + world.by_method["load_bucket"],
        "sent_gib": world.sent_bytes / GIB,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


def ray_call_us(calls: int = 4096, actors: int = 8) -> float:
    """CPU microseconds of the driver, Ray's threads in it included, for a call to an actor that a run awaits."""
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", num_cpus=2)

    @ray.remote(num_cpus=0)
    class Idle:
        def nothing(self) -> None:
            return None

    workers = [Idle.remote() for _ in range(actors)]
    ray.get([worker.nothing.remote() for worker in workers], timeout=LIMIT_S)
    begin = time.process_time()
    Watchdog().get([workers[i % actors].nothing.remote() for i in range(calls)], "nothing", limit_s=LIMIT_S)
    seconds = time.process_time() - begin
    ray.shutdown()
    return 1e6 * seconds / calls


def in_own_process(ranks: int, questions: int, n: int, tokens: int, buckets: int) -> dict[str, Any]:
    words = [str(number) for number in (ranks, questions, n, tokens, buckets)]
    done = subprocess.run(
        [sys.executable, __file__, "--row", *words], stdout=subprocess.PIPE, timeout=LIMIT_S, check=True
    )
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def draw(by_ranks: list[dict[str, Any]], by_batch: list[dict[str, Any]], path: Path) -> None:
    """Control time and memory over ranks and over the batch, with the aims."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = ((by_ranks, "ranks", "actor ranks"), (by_batch, "sequences", "sequences a step"))
    rows = (("control_s", "control, CPU seconds a step", 1.0), ("peak_gib", "driver memory, GiB", 4.0))
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


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phases_s"].items() if seconds >= 0.01)
        print(
            f"| {row['ranks']:,} | {row['sequences']:,} | {row['control_s']:.2f} | {row['peak_gib']:.2f} | "
            f"{row['sent_gib']:.2f} | {row['calls']:,} | {phases} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=512, help="of a response, on average")
    parser.add_argument("--buckets", type=int, default=8, help="into which a weight sync cuts the model")
    parser.add_argument("--n", type=int, default=16, help="completions a question, of policy and of teacher each")
    parser.add_argument("--max-ranks", type=int, default=4096)
    parser.add_argument("--max-questions", type=int, default=4096)
    parser.add_argument("--ray", action="store_true", help="also measure a call to a Ray actor")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--row", type=int, nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*options.row)))
        return

    def sizes(largest: int) -> list[int]:
        return [size for size in (64, 256, 1024, 4096) if size <= largest]

    def row(ranks: int, questions: int) -> dict[str, Any]:
        return in_own_process(ranks, questions, options.n, options.tokens, options.buckets)

    print(f"{options.tokens} tokens a response on average, {options.buckets} buckets a weight sync, Co-rewarding-II")
    print("| ranks | sequences | control, CPU s | memory, GiB | sent, GiB | calls | phases, s |")
    print("|---|---|---|---|---|---|---|")
    by_ranks = [row(ranks, options.max_questions) for ranks in sizes(options.max_ranks)]
    show(by_ranks)
    by_batch = [row(options.max_ranks, questions) for questions in sizes(options.max_questions)[:-1]]
    show(by_batch)
    by_batch.append(by_ranks[-1])
    if options.ray:
        cost = ray_call_us()
        last = by_ranks[-1]
        print(
            f"a call to a Ray actor costs the driver {cost:.0f} us: {last['calls'] * cost / 1e6:.2f} s a step at "
            f"{last['ranks']:,} ranks, of them {last['bucket_calls'] * cost / 1e6:.2f} s for buckets of weights"
        )
    if options.picture is not None:
        draw(by_ranks, by_batch, options.picture)


if __name__ == "__main__":
    main()
