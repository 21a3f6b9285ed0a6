"""Weight sync: bringing weights to the rollout engines, and proving that they arrived.

One call to the actors and one to every engine. Ranks and workers go through the buckets by themselves
(`weights.senders`, `weights.receivers`); what the driver does depends neither on the model's size nor on the buckets.
Every version of weights has a number (`types.WeightVersion`). It is stamped on every completion, and an engine that
holds another version refuses to sample.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np

from megatron_coreward.cluster.engine_group import EngineSet
from megatron_coreward.cluster.processes import CANARY_TOKENS, Processes
from megatron_coreward.cluster.worker_group import Outstanding, Workers
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import LEAST_LOGPROB_GAP
from megatron_coreward.errors import RunError
from megatron_coreward.types import FloatArray, IntArray, Problem, Role, Sequences, TokenStats, WeightVersion
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.meeting import give_up
from megatron_coreward.weights.spec import TransferSpec

CALIBRATED = 5.0  # times the first weight sync's gap: what later ones may show


class SendingActors(Workers, Protocol):
    """What a weight sync needs of the actors (`cluster.actor_group.ActorGroup`)."""

    def token_stats(self, sequences: Sequences, weights: Any, temperature: float, statistics: bool) -> TokenStats: ...


class ReceivingEngines(Workers, Protocol):
    """What a weight sync needs of the engines (`cluster.engine_group.EngineGroup`)."""

    def receive_weights(self, spec: dict[str, Any], version: int) -> Outstanding: ...


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight sync took and how far the engines are from the actors."""

    seconds: float
    canary_gap: float  # nats, mean over the canary's tokens, the worst engine's
    limit: float | None = None  # nats; a larger gap ends the run


class WeightSync:
    """Brings one role's weights at a time to the engines; the same version is never sent twice in a row."""

    def __init__(
        self,
        actors: SendingActors,
        engines: ReceivingEngines,
        wait: Callable[[Sequence[Any]], Any],
        give_up: Callable[[TransferSpec, str], None],
        *,
        spec: TransferSpec,
        canary: IntArray,
        max_gap: float,
        calibrate_above: float | None = None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """`wait` resolves the calls of commands (`ray.get`).

        Args:
            give_up: notifies all parties of a transfer that it is over (`weights.meeting`).
            spec: without the place where everybody meets.
            canary: [P] tokens of a real text, whose log-probs must agree after every weight sync.
            max_gap: mean absolute difference in nats that is still taken for arithmetic.
            calibrate_above: let the first weight sync's gap lower the limit, to `CALIBRATED` times itself but not below
                this; None: the limit stays.
            on_loaded: called when the engines hold the weights, before they are asked for the canary's log-probs.
        """
        self._actors, self._engines, self._wait, self._give_up = actors, engines, wait, give_up
        self._spec, self._run_name = spec, spec.name
        self._canary = Sequences([canary], np.asarray([1], dtype=np.int32))
        self._limit, self._calibrate_above, self._on_loaded = max_gap, calibrate_above, on_loaded
        self._opened: TransferSpec | None = None
        self._synced: WeightVersion | None = None
        self.engine_epoch = 0  # grows when an engine was replaced

    def sync_weights(self, role: Role, update: int) -> SyncReport | None:
        """Brings the role's weights after this many updates to every engine, and checks them; None if they are there.

        Raises:
            RunError: an engine's log-probs of the canary differ from the actors' by more than arithmetic.
        """
        version = WeightVersion(role, update)
        if version == self._synced:
            return None
        begin = time.perf_counter()
        self._synced = None
        spec = self.open()
        try:
            receiving = self._engines.receive_weights(spec.to_json(), version.number)
            sending = self._actors.begin("send_weights", role, version.number)
            self._wait([*sending.calls, *receiving.calls])
        except BaseException as error:
            self._give_up(spec, str(error))
            self._opened = None  # everybody has left; the next time all meet again
            raise
        self._on_loaded()
        gap = self._canary_gap(role)
        if not gap <= self._limit:
            raise RunError(
                f"weight sync: after syncing the {role} of update {update}, the engines' log-probs of the canary "
                f"differ from the actors' by {gap:.2e} nats on average; allowed: {self._limit:.0e} "
                "(sync.max_logprob_gap)"
            )
        if self._calibrate_above is not None:
            self._limit = min(self._limit, max(self._calibrate_above, CALIBRATED * gap))
            self._calibrate_above = None
        self._synced = version
        return SyncReport(time.perf_counter() - begin, gap, self._limit)

    def holds(self, version: WeightVersion) -> bool:
        """Whether the engines hold these weights, checked."""
        return version == self._synced

    def open(self) -> TransferSpec:
        """Makes the actors ready to send, with the memory that it takes; `sync_weights` does so itself."""
        if self._opened is None:
            name = f"{self._run_name}-{self.engine_epoch}-{secrets.token_hex(3)}"
            spec = replace(self._spec, name=name)
            self._opened = self._actors.call("open_sender", spec, results_of=(0,))[0]
        return self._opened

    def invalidate(self) -> None:
        """The engines have dropped their weights to sleep: the next sync sends them, whatever their version."""
        self._synced = None

    def reset(self) -> None:
        """An engine was replaced: the next sync reaches all of them, and everybody meets again."""
        self._synced = None
        self._opened = None
        self.engine_epoch += 1

    def _canary_gap(self, role: Role) -> float:
        expected = self._actors.token_stats(self._canary, role, 1.0, False).logprobs[0]
        scores: Sequence[FloatArray] = self._engines.call("score", self._canary.token_ids[0])
        return max(float(np.abs(score - expected).mean()) for score in scores)


def open_sync(
    config: RunConfig,
    processes: Processes,
    canary: IntArray,
    *,
    engines: EngineSet | None = None,
    roles: tuple[Role, ...] = ("policy", "teacher"),
) -> WeightSync:
    """The weight sync that a run is configured for.

    Args:
        engines: that hold the weights of these roles, one at a time; None: all engines.
    """
    engines = engines or processes.engines
    spec = TransferSpec(
        transport=processes.transport,
        name=f"coreward-{secrets.token_hex(6)}",
        actor=ActorLayout.of(config.actor),
        engines=EngineLayout(len(engines.numbers), config.rollout.tensor_parallel),
        roles=roles,
        dtype=config.model.dtype,
        bucket_bytes=int(config.sync.bucket_mib * 2**20),
        timeout_s=config.sync.timeout_s,
        checksums=config.sync.checksums,
    )
    colocation, rounded = processes.colocation, config.model.dtype != "float32"
    return WeightSync(
        processes.actors,
        engines,
        partial(processes.watchdog.get, awaited="weights"),
        give_up,
        spec=spec,
        canary=canary,
        max_gap=config.sync.max_logprob_gap or 0.0,
        calibrate_above=LEAST_LOGPROB_GAP[config.model.dtype] if rounded else None,
        on_loaded=(lambda: None) if colocation is None else colocation.wake_caches,
    )


def canary_tokens(problems: Iterable[Problem], count: int = CANARY_TOKENS) -> IntArray:
    """[at most count] tokens of the first questions, one after the other: text as the run samples it.

    Raises:
        ValueError: they have fewer than 2 tokens together.
    """
    prompts = [problem.prompts["original"].token_ids for problem in islice(problems, count)]
    tokens: IntArray = np.concatenate([*prompts, np.empty(0, dtype=np.int32)])[:count].astype(np.int32)
    if len(tokens) < 2:
        raise ValueError(f"the canary has {len(tokens)} tokens; it needs 2 at least")
    return tokens
