"""The ranks of the Megatron actor, as one object. What every rank does alike is asked with `call`."""

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any

import ray
from torch import distributed

from megatron_coreward.actor.packing import MicroBatchPlan, micro_batch_plans, plan_packs
from megatron_coreward.actor.relay import PROGRESS, replica_of
from megatron_coreward.actor.setup import ActorSetup, Weights
from megatron_coreward.actor.worker import ActorWorker
from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_start import worker_options
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.cluster.worker_group import Command, Outstanding, WorkerGroup
from megatron_coreward.config.accelerator import sequence_multiple, token_alignment
from megatron_coreward.types import FloatArray, Sequences, TokenStats, TrainBatch
from megatron_coreward.weights.layouts import ActorLayout

dist: Any = distributed  # its stores are not in its typed interface
STORE_S = 5.0  # to ask the ranks' store who is behind


@lru_cache(maxsize=2)  # the statistics and the update of a step are of the same sequences
def _planned_micro_batches(lengths: tuple[int, ...], *layout: int, **more: int) -> list[MicroBatchPlan]:
    return micro_batch_plans(plan_packs(lengths, *layout, **more))


class ActorGroup(WorkerGroup):
    """All ranks of the Megatron actor. Its parts are the data-parallel ranks."""

    def __init__(self, setup: ActorSetup, placement: ReservedPlacement, watchdog: Watchdog | None = None) -> None:
        """Starts the processes in the room that is reserved for them; `wait` returns once the ranks are built."""
        super().__init__("actor rank", watchdog or Watchdog())
        self.setup = setup
        variables = {}
        if setup.settings.tensor_parallel > 1:
            # Kernels start in the order of their calls, so that communication begins before what it overlaps. CUDA
            # reads this once, when anything first asks for a GPU.
            variables["CUDA_DEVICE_MAX_CONNECTIONS"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        for i in range(setup.settings.world_size):
            options = worker_options(placement.for_rank(i), setup.settings.cpu_threads, variables)
            self.add(ray.remote(ActorWorker).options(**options).remote(self.watchdog.log_of(self.kind, i)), i)
        limit = self.watchdog.settings.start_limit_s
        (self._address, *_) = self.watchdog.get([self.workers[0].address.remote()], "its address", limit_s=limit)
        self._started = [rank.start.remote(setup, i, *self._address) for i, rank in enumerate(self.workers)]
        self._commands = 0  # that were sent
        self.replicas: list[list[int]] = []  # ranks by data-parallel rank, the leader first
        self.output_ranks: tuple[int, ...] = ()  # one for each data-parallel rank: those that have results

    def wait(self) -> None:
        """Returns once all ranks hold the model."""
        limit = self.watchdog.settings.start_limit_s
        started = self.watchdog.get(self._started, "its model", limit_s=limit, interruptible=True)
        self.part_of = [dp_rank for dp_rank, _ in started]
        self.output_ranks = tuple(rank for rank, (_, is_output_rank) in enumerate(started) if is_output_rank)
        layout = ActorLayout.of(self.setup.settings)
        self.replicas = [replica_of(layout, dp_rank) for dp_rank in range(layout.data_parallel)]
        self.listen_to_lives()

    def listen_to_lives(self) -> None:
        """From here on commands go to the leaders, and one call to each of the others stands for its life."""
        for leader, *others in self.replicas:
            self.watchdog.name(self.workers[leader], self.kind, leader, partial(self._behind, [leader, *others]))
            for rank in others:
                self.watchdog.watch_life(self.workers[rank].follow.remote())

    def dispatch(self, command: Command) -> Outstanding:
        """Sends a command to the leader of each replica, who passes it on (`actor.relay`)."""
        parts = command.parts or ((),) * len(self.replicas)
        arguments = command.arguments
        if len(self.replicas) > 1 and arguments:
            arguments = tuple(ray.put(argument) for argument in arguments)  # serialised once
        calls = [
            self.workers[leader].lead.remote(command.method, command.results_of, *part, *arguments)
            for (leader, *_), part in zip(self.replicas, parts, strict=True)
        ]
        self._commands += 1
        return Outstanding(command, calls, self.watchdog, by_worker=True)

    def _behind(self, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks that have not carried out every command that was sent; asked when a wait is long."""
        try:
            address, port = self._address
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_S))
            keys = [f"{PROGRESS}/{rank}" for rank in ranks]
            done = [int(store.get(key)) if store.check([key]) else 0 for key in keys]
        except RuntimeError:  # rank 0, who serves the store, has ended, or cannot even do that
            return []
        return [rank for rank, count in zip(ranks, done, strict=True) if count < self._commands]

    def token_stats(
        self, sequences: Sequences, weights: Weights, temperature: float, statistics: bool = True
    ) -> TokenStats:
        """Log-probs of the response tokens of all sequences, in their order, and if wanted entropy and
        self-certainty."""
        plan = self._plan(sequences)
        parts = [
            (sequences.select(micro_batches.rows), micro_batches, weights, temperature, statistics)
            for micro_batches in plan
        ]
        results = self.call_parts("token_stats", parts, self.output_ranks)
        stats: list[list[FloatArray]] = [[None] * len(sequences) for _ in range(3)]  # type: ignore[list-item]
        for rank, result in zip(self.output_ranks, results, strict=True):
            rows = plan[self.part_of[rank]].rows
            of_rank = result.logprobs, result.entropy, result.self_certainty
            for target, source in zip(stats, of_rank[: 3 if statistics else 1], strict=False):
                for row, values in zip(rows, source, strict=True):
                    target[row] = values
        return TokenStats(*stats) if statistics else TokenStats(stats[0], (), ())

    def update(self, batch: TrainBatch) -> dict[str, float]:
        """One optimizer step. Returns sums over the batch's response tokens, and the step's global figures."""
        plan = self._plan(batch.sequences)
        parts = [(batch.select(micro_batches.rows), micro_batches) for micro_batches in plan]
        reports = self.call_parts("update", parts, self.output_ranks)
        merged: dict[str, float] = dict(reports[0])
        for key in merged.keys() - {"grad_norm", "lr"}:
            values = [report[key] for report in reports]
            merged[key] = max(values) if key.startswith("max:") else sum(values)
        return merged

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
