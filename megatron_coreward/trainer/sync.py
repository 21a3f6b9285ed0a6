"""Publishing weights to the rollout engines, and proving that they arrived.

A version number names the weights: 2u for the policy after u updates, 2u + 1 for the teacher of that moment. It is
stamped on every completion, and an engine that holds another version refuses to sample.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from megatron_coreward.errors import RunError
from megatron_coreward.types import FloatArray, IntArray, Role, Sequences, TokenStats
from megatron_coreward.weights.buckets import SegmentLayout


def weight_version(role: Role, num_updates: int) -> int:
    """The number that names a role's weights after `num_updates` optimizer steps."""
    return 2 * num_updates + (role == "teacher")


class PublishingActors(Protocol):
    """What publishing needs of the actors (`trainer.cluster.ActorGroup`)."""

    def open_sender(self, weights: Any, segment: str, bucket_bytes: int) -> dict[str, Any]: ...
    def write_bucket(self, weights: Any, bucket: int) -> list[Any]: ...
    def token_stats(self, sequences: Sequences, weights: Any, temperature: float) -> TokenStats: ...


class ReceivingEngines(Protocol):
    """What publishing needs of the engines (`trainer.cluster.EngineGroup`)."""

    def start_update(self, init_info: dict[str, Any]) -> None: ...
    def load_bucket(self, bucket: int) -> list[Any]: ...
    def finish_update(self, version: int) -> None: ...
    def score(self, token_ids: IntArray) -> list[FloatArray]: ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one publication took and how far the engines are from the actors."""

    seconds: float
    probe_gap: float  # nats, mean over the probe's tokens, the worst engine's


class WeightSync:
    """Publishes one role's weights at a time; the same version is never sent twice in a row."""

    def __init__(
        self,
        actors: PublishingActors,
        engines: ReceivingEngines,
        wait: Any,
        *,
        run_id: str,
        bucket_bytes: int,
        probe: IntArray,
        max_gap: float,
    ) -> None:
        """`wait` resolves what `write_bucket` and `load_bucket` return (`ray.get`).

        Args:
            run_id: makes the names of shared-memory segments unique on a host.
            probe: [P] tokens whose log-probs must agree after every publication.
            max_gap: mean absolute difference in nats that is still taken for arithmetic.
        """
        self._actors, self._engines, self._wait = actors, engines, wait
        self._run_id, self._bucket_bytes = run_id, bucket_bytes
        self._probe = Sequences([probe], np.asarray([1], dtype=np.int32))
        self._max_gap = max_gap
        self._init_info: dict[Role, dict[str, Any]] = {}
        self._published: int | None = None

    def publish(self, role: Role, version: int) -> SyncReport | None:
        """Brings the role's present weights to every engine and checks them; None where they are there already.

        Raises:
            RunError: an engine's log-probs of the probe differ from the actors' by more than arithmetic.
        """
        if version == self._published:
            return None
        begin = time.perf_counter()
        self._published = None
        if role not in self._init_info:
            segment = f"coreward-{self._run_id}-{role}"
            self._init_info[role] = self._actors.open_sender(role, segment, self._bucket_bytes)
        self._engines.start_update(self._init_info[role])
        self._transfer(role, len(SegmentLayout.from_json(self._init_info[role]).buckets))
        self._engines.finish_update(version)
        gap = self._probe_gap(role)
        if not gap <= self._max_gap:
            raise RunError(
                f"weight sync: after publishing version {version} ({role}), the engines' log-probs of the probe differ "
                f"from the actors' by {gap:.2e} nats on average; allowed: {self._max_gap:.0e} (sync.max_logprob_gap)"
            )
        self._published = version
        return SyncReport(time.perf_counter() - begin, gap)

    def _transfer(self, role: Role, buckets: int) -> None:
        """Two slots: while the engines load one bucket, the actors write the next."""
        loading: list[Any] = []
        for bucket in range(buckets):
            writing = self._actors.write_bucket(role, bucket)
            self._wait([*writing, *loading])
            loading = self._engines.load_bucket(bucket)
        self._wait(loading)

    def _probe_gap(self, role: Role) -> float:
        expected = self._actors.token_stats(self._probe, role, 1.0).logprobs[0]
        scores: Sequence[FloatArray] = self._engines.score(self._probe.token_ids[0])
        return max(float(np.abs(score - expected).mean()) for score in scores)
