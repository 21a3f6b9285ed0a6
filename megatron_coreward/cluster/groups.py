"""The processes of a run: Ray, the group of actor ranks, the group of rollout engines.

To the loop each group looks like one object; how its calls are cut over processes is told here and nowhere else. Calls
that fail raise the worker's error, with its traceback, in the driver. Every wait goes through the watchdog.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import ray
import torch

from megatron_coreward.actor.packing import MicroBatchPlan, micro_batch_plans, plan_packs
from megatron_coreward.actor.setup import ActorSetup, Weights
from megatron_coreward.actor.worker import ActorWorker
from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_security import check_token_needed, keep_to_this_host
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.config.accelerator import sequence_multiple, token_alignment
from megatron_coreward.config.schema import RolloutSettings
from megatron_coreward.rollout.engine import Sample, SamplingRequest
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.types import FloatArray, IntArray, Role, Sequences, TokenStats, TrainBatch
from megatron_coreward.weights.spec import TransferSpec

PATIENCE_S = 20.0  # with workers that are asked to leave


def start_ray(limit_s: float = 600.0) -> None:
    """Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine, on loopback, without a dashboard.

    Ends the process where that takes longer than `limit_s`: it is one call into native code, which waits for ever where
    one of Ray's processes dies in it.
    """
    if not ray.is_initialized():
        with _no_longer_than(limit_s, "the start of Ray"):
            _init_ray()


@contextmanager
def _no_longer_than(limit_s: float, awaited: str) -> Iterator[None]:
    def give_up() -> None:
        text = f"stalled: {awaited} was awaited for {limit_s:.0f} s (watchdog.start_limit_s)"
        print(f"the run failed: {text}; the same command tries again", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _init_ray() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would start a worker a core that nobody here uses, and wait for ever where one dies meanwhile (ray#40131).
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are the run; at 15 any other process starves them
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    keep_to_this_host()
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        object_store_memory=None if torch.cuda.is_available() else 2**30,
    )
    check_token_needed()


def stop_ray() -> None:
    """Ends the processes of this run; a cluster that was joined stays."""
    if ray.is_initialized():
        ray.shutdown()


def _options(place: Mapping[str, Any], cpu_threads: int, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ray options of a worker. OpenMP threads that spin between phases would starve the other processes of a core.

    Args:
        place: where it goes, and the GPUs that it takes.
        more: further environment variables.
    """
    variables = {
        "OMP_NUM_THREADS": str(cpu_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # who takes no GPU of Ray's keeps those that it was told to see
    }
    if not torch.cuda.is_available():
        # Activations are freed and taken anew in every micro-batch: kept in the heap, they need no new pages (7%).
        variables |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {
        "num_cpus": 0,
        "runtime_env": {"env_vars": variables | dict(more or {})},
        "max_restarts": 0,
        **place,
    }


@lru_cache(maxsize=2)  # the statistics and the update of a step are of the same sequences
def _planned_micro_batches(lengths: tuple[int, ...], *layout: int, **more: int) -> list[MicroBatchPlan]:
    return micro_batch_plans(plan_packs(lengths, *layout, **more))


class ActorGroup:
    """All ranks of the Megatron actor."""

    def __init__(self, setup: ActorSetup, placement: ReservedPlacement, watchdog: Watchdog | None = None) -> None:
        """Starts the processes where there is room for them; `wait` returns once the ranks are built."""
        self.setup = setup
        self._watchdog = watchdog or Watchdog()
        variables = {}
        if setup.settings.tensor_parallel > 1:
            # Kernels start in the order of their calls, so that communication begins before what it overlaps. CUDA
            # reads this once, when anything first asks for a GPU.
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        self._ranks = [
            ray.remote(ActorWorker)
            .options(**_options(placement.for_rank(i), setup.settings.cpu_threads, variables))
            .remote(self._watchdog.log_of("actor rank", i))
            for i in range(setup.settings.world_size)
        ]
        for i, rank in enumerate(self._ranks):
            self._watchdog.name(rank, "actor rank", i)
        limit = self._watchdog.settings.start_limit_s
        (address, port), *_ = self._watchdog.get([self._ranks[0].address.remote()], "its address", limit_s=limit)
        self._started = [rank.start.remote(setup, i, address, port) for i, rank in enumerate(self._ranks)]
        self._dp_ranks: list[int] = []

    def wait(self) -> None:
        """Returns once all ranks hold the model."""
        limit = self._watchdog.settings.start_limit_s
        started = self._watchdog.get(self._started, "its model", limit_s=limit, interruptible=True)
        self._dp_ranks = [dp_rank for dp_rank, _ in started]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """The method on every rank with the same arguments."""
        return self._watchdog.get([getattr(rank, method).remote(*args) for rank in self._ranks], method)

    def _plan(self, sequences: Sequences) -> list[MicroBatchPlan]:
        s = self.setup.settings
        return _planned_micro_batches(
            tuple(sequences.lengths),
            s.data_parallel,
            s.tokens_per_microbatch,
            multiple_of=s.pipeline_parallel if s.virtual_pipeline > 1 else 1,
            align=token_alignment(s),
            pad=sequence_multiple(s),
        )

    def _spread(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The method on every rank with the arguments of its data-parallel rank, each sent once."""
        sent = [tuple(ray.put(argument) for argument in part) for part in parts]
        calls = [
            getattr(rank, method).remote(*sent[dp_rank])
            for rank, dp_rank in zip(self._ranks, self._dp_ranks, strict=True)
        ]
        return self._watchdog.get(calls, method)

    def token_stats(self, sequences: Sequences, weights: Weights, temperature: float) -> TokenStats:
        """Statistics of the response tokens of all sequences, in their order."""
        plan = self._plan(sequences)
        parts = [(sequences.select(micro_batches.rows), micro_batches, weights, temperature) for micro_batches in plan]
        results = self._spread("token_stats", parts)
        stats: list[list[FloatArray]] = [[None] * len(sequences) for _ in range(3)]  # type: ignore[list-item]
        for dp_rank, result in zip(self._dp_ranks, results, strict=True):
            if result is not None:
                of_rank = result.logprobs, result.entropy, result.self_certainty
                for target, source in zip(stats, of_rank, strict=True):
                    for row, values in zip(plan[dp_rank].rows, source, strict=True):
                        target[row] = values
        return TokenStats(*stats)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step. Returns sums over the batch's response tokens, and the step's global figures."""
        plan = self._plan(batch.sequences)
        results = self._spread("update", [(batch.select(micro_batches.rows), micro_batches) for micro_batches in plan])
        reports = [result for result in results if result is not None]
        merged = dict(reports[0])
        for key in merged.keys() - {"grad_norm", "lr"}:
            values = [report[key] for report in reports]
            merged[key] = max(values) if key.startswith("max:") else sum(values)
        return merged

    def update_ema_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * policy."""
        self._all("update_ema_teacher", decay)

    def describe(self) -> dict[str, str]:
        """What the ranks compute with, as far as it depends on what is installed."""
        return self._all("describe")[0]  # type: ignore[no-any-return]

    def offload(self) -> list[DeviceMemory | None]:
        """Every rank gives away the memory of what neither publishing nor a probe needs."""
        return self._all("offload")

    def onload(self) -> list[DeviceMemory | None]:
        """Every rank takes its memory back."""
        return self._all("onload")

    def open_sender(self, spec: TransferSpec) -> TransferSpec:
        """Prepares all ranks to send weights; returns the spec with the place where all parties meet."""
        return self._all("open_sender", spec)[0]  # type: ignore[no-any-return]

    def send_weights(self, role: Role, version: int) -> list[Any]:
        """Lets every rank send; `ray.get` waits."""
        return [rank.send_weights.remote(role, version) for rank in self._ranks]

    def save(self, target: Any) -> None:
        """Writes the training state under `target`."""
        self._all("save", target)

    def begin_save(self, target: Any) -> None:
        """Begins to write the training state under `target`; returns once training may change it."""
        self._all("begin_save", target)

    def save_written(self) -> bool:
        """Whether every rank has written its part."""
        return all(self._all("save_written"))

    def finish_save(self) -> dict[str, tuple[int, str]]:
        """Completes the save under way; returns size and hash of the files that the ranks wrote."""
        return {name: entry for files in self._all("finish_save") for name, entry in files.items()}

    def load(self, source: Any) -> None:
        """Takes the training state from `source`."""
        self._all("load", source)

    def export_hf(self, weights: Weights, target: Any) -> None:
        """Writes a Hugging Face model directory."""
        self._all("export_hf", weights, target)

    def shutdown(self, patience_s: float = PATIENCE_S) -> None:
        """Ends the ranks."""
        _end(self._ranks, patience_s)


class EngineGroup:
    """All rollout engines."""

    def __init__(
        self,
        model_path: Any,
        settings: RolloutSettings,
        placement: ReservedPlacement,
        dtype: str,
        max_model_len: int,
        seed: int,
        own_weights: int | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Starts the processes where there is room for them; `wait` returns once the engines are up.

        Args:
            own_weights: sample from the weights of `model_path`, under this version, before any update.
        """
        self._watchdog = watchdog or Watchdog()
        self._model_path, self._placement, self._cpu_threads = model_path, placement, settings.cpu_threads
        self.slept: list[DeviceMemory | None] = []  # what each engine gave when they were put to sleep last
        self._arguments = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "tensor_parallel": settings.tensor_parallel,
            "max_num_seqs": settings.max_num_seqs,
            "kv_cache_gib": settings.kv_cache_gib,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "cpu_threads": settings.cpu_threads,
            "seed": seed,
            "own_weights": own_weights,
            "quantization": settings.quantization,
            "cuda_graphs": settings.cuda_graphs,
        }
        self._engines = [self._start(i) for i in range(settings.num_engines)]
        self._started = [engine.ready.remote() for engine in self._engines]
        self.sampling_seconds: list[float] = []  # of each engine, of the last samples; emptied when it is taken

    def _start(self, index: int) -> Any:
        place = self._placement.for_engine(index), self._cpu_threads, self._placement.variables_for_engine(index)
        log = self._watchdog.log_of("engine", index)
        engine = (
            ray.remote(RolloutWorker).options(**_options(*place)).remote(self._model_path, log=log, **self._arguments)
        )
        self._watchdog.name(engine, "engine", index)
        return engine

    def wait(self) -> None:
        """Returns once all engines are up."""
        limit = self._watchdog.settings.start_limit_s
        self._watchdog.get(self._started, "its start", limit_s=limit, interruptible=True)

    def restart(self, index: int) -> None:
        """Puts a new engine, without weights, in the place of one that died."""
        ray.kill(self._engines[index])
        self._engines[index] = self._start(index)
        self._started = [self._engines[index].ready.remote()]
        self.wait()

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self._watchdog.get([getattr(engine, method).remote(*args) for engine in self._engines], method)

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Sample]]:
        """Samples of all requests, in their order."""
        return self.begin(requests, expected_version)()

    def begin(self, requests: Sequence[SamplingRequest], expected_version: int) -> Callable[[], list[list[Sample]]]:
        """Lets the engines begin; the result waits for the samples. Engine i takes requests i, i + n, i + 2n ...

        The shares are fixed: were they given out as engines become free, the sizes of an engine's batches, and with
        them the rounding of its matrix products, would depend on timing, and no run could be repeated bit by bit.
        `sampling_seconds` tells a slow engine.
        """
        n = len(self._engines)
        begin = time.perf_counter()
        calls = [engine.sample.remote(list(requests[i::n]), expected_version) for i, engine in enumerate(self._engines)]

        def finish() -> list[list[Sample]]:
            seconds = [0.0] * n

            def done(engine: int) -> None:
                seconds[engine] = time.perf_counter() - begin

            results: list[list[Sample]] = [[] for _ in requests]
            for i, part in enumerate(self._watchdog.get(calls, "rollouts", interruptible=True, on_result=done)):
                results[i::n] = part.unpack()
            self.sampling_seconds = seconds
            return results

        return finish

    def take_sampling_metrics(self) -> dict[str, float]:
        """How long the slowest and the fastest engine sampled since this was asked last; empty: not at all."""
        seconds, self.sampling_seconds = self.sampling_seconds, []
        if not seconds:
            return {}
        return {"rollout/slowest_engine_s": max(seconds), "rollout/fastest_engine_s": min(seconds)}

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        """[P - 1] log-probs of tokens 2 to P, from each engine."""
        return self._all("score", token_ids)

    def receive_weights(self, spec: dict[str, Any], version: int) -> list[Any]:
        """Lets every engine receive what the actors send; `ray.get` waits."""
        return [
            engine.receive_weights.remote({"spec": spec, "engine": i}, version)
            for i, engine in enumerate(self._engines)
        ]

    def sleep(self) -> list[DeviceMemory | None]:
        """Every engine gives its memory away, weights and caches; it needs `wake` and an update before it samples."""
        self.slept = self._all("sleep")
        return self.slept

    def wake(self, part: str) -> list[DeviceMemory | None]:
        """Every engine takes memory back: that of its `weights` or of its `kv_cache`."""
        return self._all("wake", part)

    def abandon(self) -> None:
        """Ends the engines at once, whatever they do."""
        for engine in self._engines:
            ray.kill(engine)

    def shutdown(self, patience_s: float = PATIENCE_S) -> None:
        """Ends the engines."""
        _end(self._engines, patience_s)


def _end(workers: Sequence[Any], patience_s: float) -> None:
    """Asks the workers to leave and ends those that do not."""
    calls = [worker.shutdown.remote() for worker in workers]
    ray.wait(calls, num_returns=len(calls), timeout=patience_s)
    for worker in workers:
        ray.kill(worker)
