"""The processes of a run: Ray, the group of actor ranks, the group of rollout engines.

To the loop each group looks like one object; how its calls are cut over processes is told here and nowhere else. Calls
that fail raise the worker's error, with its traceback, in the driver.
"""

import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from megatron_coreward.actor.packing import plan_packs, shares
from megatron_coreward.actor.setup import ActorSetup, Weights
from megatron_coreward.actor.worker import ActorWorker
from megatron_coreward.config.schema import RolloutSettings
from megatron_coreward.errors import InputError
from megatron_coreward.rollout.engine import Sample, SamplingRequest
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.types import FloatArray, IntArray, Sequences, TokenStats, TrainBatch
from megatron_coreward.weights.route import Route, Transport

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 3600.0


def start_ray() -> None:
    """Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine, on loopback, without a dashboard."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are the run; at 15 any other process starves them
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        object_store_memory=None if torch.cuda.is_available() else 2**30,
    )


def stop_ray() -> None:
    """Ends the processes of this run; a cluster that was joined stays."""
    if ray.is_initialized():
        ray.shutdown()


def resolve_transport(transport: str) -> Transport:
    """What `sync.transport` means on the cluster that was joined.

    Raises:
        InputError: shared memory was asked for and the cluster has several hosts.
    """
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if transport == "shared_memory" and len(hosts) > 1:
        raise InputError(
            f"sync.transport: shared_memory reaches one host, the cluster has {len(hosts)}; use auto or gloo"
        )
    if transport == "gloo" or len(hosts) > 1:
        return "gloo"
    return "shared_memory"


def _options(num_gpus: int, cpu_threads: int) -> dict[str, Any]:
    """Ray options of a worker. OpenMP threads that spin between phases would starve the other processes of a core."""
    variables = {
        "OMP_NUM_THREADS": str(cpu_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if not torch.cuda.is_available():
        # Activations are freed and taken anew in every micro-batch: kept in the heap, they need no new pages (7%).
        variables |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {
        "num_cpus": 0,
        "num_gpus": num_gpus if torch.cuda.is_available() else 0,
        "runtime_env": {"env_vars": variables},
        "max_restarts": 0,
    }


class ActorGroup:
    """All ranks of the Megatron actor."""

    def __init__(self, setup: ActorSetup) -> None:
        """Starts the processes; `wait` returns once the ranks are built."""
        self.setup = setup
        remote = ray.remote(ActorWorker).options(**_options(1, setup.settings.cpu_threads))
        self._ranks = [remote.remote() for _ in range(setup.settings.world_size)]
        address, port = ray.get(self._ranks[0].address.remote(), timeout=START_TIMEOUT_S)
        self._started = [rank.start.remote(setup, i, address, port) for i, rank in enumerate(self._ranks)]
        self._dp_ranks: list[int] = []

    def wait(self) -> None:
        """Returns once all ranks hold the model."""
        self._dp_ranks = [dp_rank for dp_rank, _ in ray.get(self._started, timeout=START_TIMEOUT_S)]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """The method on every rank with the same arguments."""
        calls = [getattr(rank, method).remote(*args) for rank in self._ranks]
        return ray.get(calls, timeout=CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def _plan(self, sequences: Sequences) -> list[Any]:
        s = self.setup.settings
        plan = plan_packs(
            sequences.lengths,
            s.data_parallel,
            s.tokens_per_microbatch,
            multiple_of=s.pipeline_parallel if s.virtual_pipeline > 1 else 1,
            align=s.tensor_parallel,
        )
        return shares(plan)

    def _spread(self, method: str, parts: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The method on every rank with the arguments of its data-parallel rank, each sent once."""
        sent = [tuple(ray.put(argument) for argument in part) for part in parts]
        calls = [
            getattr(rank, method).remote(*sent[dp_rank])
            for rank, dp_rank in zip(self._ranks, self._dp_ranks, strict=True)
        ]
        return ray.get(calls, timeout=CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def token_stats(self, sequences: Sequences, weights: Weights, temperature: float) -> TokenStats:
        """Statistics of the response tokens of all sequences, in their order."""
        plan = self._plan(sequences)
        parts = [(sequences.select(share.rows), share, weights, temperature) for share in plan]
        results = self._spread("token_stats", parts)
        stats: list[list[FloatArray]] = [[None] * len(sequences) for _ in range(3)]  # type: ignore[list-item]
        for dp_rank, result in zip(self._dp_ranks, results, strict=True):
            if result is not None:
                for place, row in enumerate(plan[dp_rank].rows):
                    for target, source in zip(
                        stats, (result.logprobs, result.entropy, result.self_certainty), strict=True
                    ):
                        target[row] = source[place]
        return TokenStats(*stats)

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step. Returns sums over the batch's response tokens, and the step's global figures."""
        plan = self._plan(batch.sequences)
        results = self._spread("update", [(batch.select(share.rows), share) for share in plan])
        reports = [result for result in results if result is not None]
        merged = dict(reports[0])
        for key in merged.keys() - {"grad_norm", "lr"}:
            values = [report[key] for report in reports]
            merged[key] = max(values) if key.startswith("max:") else sum(values)
        return merged

    def move_teacher(self, decay: float) -> None:
        """teacher <- decay * teacher + (1 - decay) * policy."""
        self._all("move_teacher", decay)

    def open_sender(self, weights: Weights, route: Route) -> dict[str, Any]:
        """Prepares to publish one set of weights; returns what the receiving engines need to know."""
        return self._all("open_sender", weights, route)[0]  # type: ignore[no-any-return]

    def write_bucket(self, weights: Weights, bucket: int, version: int, hashes: bool) -> list[Any]:
        """Starts writing a bucket on every rank; `ray.get` waits, and brings the checksums of each rank's blocks."""
        return [rank.write_bucket.remote(weights, bucket, version, hashes) for rank in self._ranks]

    def save(self, target: Any) -> None:
        """Writes the training state under `target`."""
        self._all("save", target)

    def load(self, source: Any) -> None:
        """Takes the training state from `source`."""
        self._all("load", source)

    def export_hf(self, weights: Weights, target: Any) -> None:
        """Writes a Hugging Face model directory."""
        self._all("export_hf", weights, target)

    def shutdown(self) -> None:
        """Ends the ranks."""
        _end(self._ranks)


class EngineGroup:
    """All rollout engines."""

    def __init__(
        self,
        model_path: Any,
        settings: RolloutSettings,
        dtype: str,
        max_model_len: int,
        seed: int,
        own_weights: int | None = None,
        transport: Transport = "shared_memory",
    ) -> None:
        """Starts the processes; `wait` returns once the engines are up.

        Args:
            own_weights: sample from the weights of `model_path`, under this version, before any update.
        """
        remote = ray.remote(RolloutWorker).options(**_options(settings.tensor_parallel, settings.cpu_threads))
        self._engines = [
            remote.remote(
                model_path,
                dtype=dtype,
                max_model_len=max_model_len,
                tensor_parallel=settings.tensor_parallel,
                max_num_seqs=settings.max_num_seqs,
                kv_cache_gib=settings.kv_cache_gib,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                cpu_threads=settings.cpu_threads,
                seed=seed,
                own_weights=own_weights,
                weight_transfer=transport,
            )
            for _ in range(settings.num_engines)
        ]
        self._started = [engine.ready.remote() for engine in self._engines]

    def wait(self) -> None:
        """Returns once all engines are up."""
        ray.get(self._started, timeout=START_TIMEOUT_S)

    def _all(self, method: str, *args: Any) -> list[Any]:
        calls = [getattr(engine, method).remote(*args) for engine in self._engines]
        return ray.get(calls, timeout=CALL_TIMEOUT_S)  # type: ignore[no-any-return]

    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> list[list[Sample]]:
        """Samples of all requests, in their order; engine i takes requests i, i + n, i + 2n ..."""
        n = len(self._engines)
        calls = [engine.sample.remote(list(requests[i::n]), expected_version) for i, engine in enumerate(self._engines)]
        results: list[list[Sample]] = [[] for _ in requests]
        for i, part in enumerate(ray.get(calls, timeout=CALL_TIMEOUT_S)):
            results[i::n] = part
        return results

    def score(self, token_ids: IntArray) -> list[FloatArray]:
        """[P - 1] log-probs of tokens 2 to P, from each engine."""
        return self._all("score", token_ids)

    def start_update(self, init_info: dict[str, Any]) -> None:
        """Begins an update of all weights on every engine; one that must know its number is told it."""
        numbered = "engine" in init_info
        calls = [
            engine.start_update.remote(init_info | {"engine": i} if numbered else init_info)
            for i, engine in enumerate(self._engines)
        ]
        ray.get(calls, timeout=CALL_TIMEOUT_S)

    def load_bucket(self, bucket: int, version: int, hashes: Sequence[Any]) -> list[Any]:
        """Starts loading a bucket on every engine; `ray.get` waits for the result."""
        sent = ray.put(list(hashes))
        return [engine.load_bucket.remote(bucket, version, sent) for engine in self._engines]

    def finish_update(self, version: int) -> None:
        """Ends the update and names the weights."""
        self._all("finish_update", version)

    def shutdown(self) -> None:
        """Ends the engines."""
        _end(self._engines)


def _end(workers: Sequence[Any]) -> None:
    """Asks the workers to leave and ends those that do not."""
    calls = [worker.shutdown.remote() for worker in workers]
    ray.wait(calls, num_returns=len(calls), timeout=20)
    for worker in workers:
        ray.kill(worker)
