"""The ranks of the Megatron actor, as one object. What every rank does alike is asked with `call`."""

import os
from functools import lru_cache

import ray

from megatron_coreward.actor.packing import MicroBatchPlan, micro_batch_plans, plan_packs
from megatron_coreward.actor.setup import ActorSetup, Weights
from megatron_coreward.actor.worker import ActorWorker
from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.cluster.ray_start import worker_options
from megatron_coreward.cluster.watchdog import Watchdog
from megatron_coreward.cluster.worker_group import WorkerGroup
from megatron_coreward.config.accelerator import sequence_multiple, token_alignment
from megatron_coreward.types import FloatArray, Sequences, TokenStats, TrainBatch


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
        (address, port), *_ = self.watchdog.get([self.workers[0].address.remote()], "its address", limit_s=limit)
        self._started = [rank.start.remote(setup, i, address, port) for i, rank in enumerate(self.workers)]
        self.output_ranks: tuple[int, ...] = ()  # one for each data-parallel rank: those that have results

    def wait(self) -> None:
        """Returns once all ranks hold the model."""
        limit = self.watchdog.settings.start_limit_s
        started = self.watchdog.get(self._started, "its model", limit_s=limit, interruptible=True)
        self.part_of = [dp_rank for dp_rank, _ in started]
        self.output_ranks = tuple(rank for rank, (_, is_output_rank) in enumerate(started) if is_output_rank)

    def token_stats(self, sequences: Sequences, weights: Weights, temperature: float) -> TokenStats:
        """Statistics of the response tokens of all sequences, in their order."""
        plan = self._plan(sequences)
        parts = [(sequences.select(micro_batches.rows), micro_batches, weights, temperature) for micro_batches in plan]
        results = self.call_parts("token_stats", parts, self.output_ranks)
        stats: list[list[FloatArray]] = [[None] * len(sequences) for _ in range(3)]  # type: ignore[list-item]
        for rank, result in zip(self.output_ranks, results, strict=True):
            rows = plan[self.part_of[rank]].rows
            of_rank = result.logprobs, result.entropy, result.self_certainty
            for target, source in zip(stats, of_rank, strict=True):
                for row, values in zip(rows, source, strict=True):
                    target[row] = values
        return TokenStats(*stats)

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
