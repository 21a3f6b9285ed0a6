"""Publishing weights to the rollout engines, and proving that they arrived.

A version number names the weights: 2u for the policy after u updates, 2u + 1 for the teacher of that moment. It is
stamped on every completion, and an engine that holds another version refuses to sample.
"""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from megatron_coreward.cluster.processes import CANARY_TOKENS, Processes
from megatron_coreward.cluster.worker_group import Workers
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.types import FloatArray, IntArray, Role, Sequences, TokenStats
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.route import MEETING, Route


def weight_version(role: Role, num_updates: int) -> int:
    """The number that names a role's weights after `num_updates` optimizer steps."""
    return 2 * num_updates + (role == "teacher")


class SendingActors(Workers, Protocol):
    """What a weight sync needs of the actors (`cluster.actor_group.ActorGroup`)."""

    def token_stats(self, sequences: Sequences, weights: Any, temperature: float, statistics: bool) -> TokenStats: ...


class ReceivingEngines(Workers, Protocol):
    """What a weight sync needs of the engines (`cluster.engine_group.EngineGroup`)."""

    def start_update(self, init_info: dict[str, Any]) -> None: ...
    def load_bucket(self, bucket: int, version: int, hashes: Sequence[Any]) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one publication took and how far the engines are from the actors."""

    seconds: float
    canary_gap: float  # nats, mean over the probe's tokens, the worst engine's


class WeightSync:
    """Publishes one role's weights at a time; the same version is never sent twice in a row."""

    def __init__(
        self,
        actors: SendingActors,
        engines: ReceivingEngines,
        wait: Any,
        *,
        route: Route,
        num_buckets: int,
        canary: IntArray,
        max_gap: float,
        hashes: bool = False,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`wait` resolves what `write_bucket` and `load_bucket` return (`ray.get`).

        Args:
            num_buckets: into which `route.bucket_bytes` cuts the model.
            hashes: compare checksums of every block where it is loaded.
            probe: [P] tokens whose log-probs must agree after every publication.
            max_gap: mean absolute difference in nats that is still taken for arithmetic.
            on_loaded: called when the engines hold the weights, before they are asked for the canary's log-probs.
        """
        self._actors, self._engines, self._wait = actors, engines, wait
        self._route, self._num_buckets, self._hashes = route, num_buckets, hashes
        self._canary = Sequences([canary], np.asarray([1], dtype=np.int32))
        self._max_gap, self._on_loaded = max_gap, on_loaded
        self._init_info: dict[Role, dict[str, Any]] = {}
        self._published: int | None = None
        self.poisoned = False  # a transfer failed that some processes will wait in for ever
        self.engine_epoch = 0  # of the engines: grows when one was started anew

    def sync_weights(self, role: Role, version: int) -> SyncReport | None:
        """Brings the role's present weights to every engine and checks them; None if they are there already.

        Raises:
            RunError: an engine's log-probs of the probe differ from the actors' by more than arithmetic.
        """
        if version == self._published:
            return None
        begin = time.perf_counter()
        self._published = None
        self.open(role)
        self.poisoned = self._route.transport == "nccl"  # whose broadcasts do not end when a member has gone
        self._engines.start_update(self._init_info[role])
        self._transfer(role, version)
        self._engines.call("finish_update", version)
        self.poisoned = False
        self._on_loaded()
        gap = self._canary_gap(role)
        if not gap <= self._max_gap:
            raise RunError(
                f"weight sync: after publishing version {version} ({role}), the engines' log-probs of the probe differ "
                f"from the actors' by {gap:.2e} nats on average; allowed: {self._max_gap:.0e} (sync.max_logprob_gap)"
            )
        self._published = version
        return SyncReport(time.perf_counter() - begin, gap)

    def open(self, role: Role) -> None:
        """Makes the actors ready to send a role's weights, with the memory that it takes; `publish` does so itself."""
        if role not in self._init_info:
            self._init_info[role] = self._actors.call("open_sender", role, self._route, results_of=(0,))[0]

    def invalidate(self) -> None:
        """The engines have dropped their weights to sleep: the next `publish` sends them, whatever their version."""
        self._published = None

    def reset(self) -> None:
        """Takes nothing for published any more: an engine is new. The next `publish` reaches all of them."""
        self._published = None
        self.engine_epoch += 1
        if self._route.transport in MEETING:  # the new one has to join a new group; everybody else leaves the old one
            self._init_info.clear()

    def _transfer(self, role: Role, version: int) -> None:
        """While the engines load one bucket, the actors write the next."""
        loading: list[Any] = []
        for bucket in range(self._num_buckets):
            writing = self._actors.begin("write_bucket", role, bucket, version, self._hashes).calls
            written = self._wait([*writing, *loading])[: len(writing)]
            loading = self._engines.load_bucket(bucket, version, [h for of_rank in written for h in of_rank])
        self._wait(loading)

    def _canary_gap(self, role: Role) -> float:
        expected = self._actors.token_stats(self._canary, role, 1.0, False).logprobs[0]
        scores: Sequence[FloatArray] = self._engines.call("score", self._canary.token_ids[0])
        return max(float(np.abs(score - expected).mean()) for score in scores)


def open_sync(config: RunConfig, arch: Architecture, processes: Processes) -> WeightSync:
    """The weight sync that a run is configured for."""
    layout = EngineLayout(config.rollout.num_engines, config.rollout.tensor_parallel)
    bucket_bytes = int(config.sync.bucket_mib * 2**20)
    route = Route(processes.transport, f"coreward-{secrets.token_hex(6)}", bucket_bytes, layout, config.sync.timeout_s)
    colocation = processes.colocation
    return WeightSync(
        processes.actors,
        processes.engines,
        partial(processes.watchdog.get, awaited="a bucket of weights"),
        route=route,
        num_buckets=route.num_buckets(arch, config.model.dtype),
        canary=canary_tokens(arch.vocab_size, config.seed),
        max_gap=config.sync.max_logprob_gap or 0.0,
        hashes=config.sync.checksums,
        on_loaded=(lambda: None) if colocation is None else colocation.wake_caches,
    )


def canary_tokens(vocab_size: int, seed: int, count: int = CANARY_TOKENS) -> IntArray:
    """[count] tokens drawn over the whole vocabulary: they touch more of the embedding than any text."""
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.int32)
