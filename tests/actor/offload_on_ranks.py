"""What tests of memory and packing run on the ranks. Every function takes the rank first and returns plain data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_coreward.actor.packing import MicroBatchPlan
from megatron_coreward.types import TrainBatch
from tests.actor.on_ranks import make_setup, share_of, start, whole_gradients


def train(
    rank: int,
    path: Path,
    layout: dict[str, Any],
    port: int,
    batch: TrainBatch,
    dtype: str,
    colocation: bool,
    folder: Path,
) -> dict[str, Any]:
    """Two updates with a teacher that follows, and a checkpoint; with `colocation`, state is offloaded meanwhile."""
    actor = start(rank, make_setup(path, layout, dtype=dtype), port)
    micro_batches = share_of(actor, batch.sequences)
    part = batch.select(micro_batches.rows)
    held, copies_kept = [], 0
    for _ in range(2):
        actor.update(part, micro_batches)
        if colocation:
            actor.offload()
            held.append(sum(c.buffers[0].grad_data.untyped_storage().nbytes() for c in actor.policy))
            # What a canary asks while the engines are awake; the copies that Transformer Engine makes for it are faked.
            for weights in ("policy", "teacher"):
                module = actor._modules(weights)[0].decoder
                module._fp8_workspaces = {"weight": torch.zeros(1)}
                actor.token_stats(part.sequences, micro_batches, weights, 1.0)
                copies_kept += len(module._fp8_workspaces)
            actor.onload()
            module._fp8_workspaces = {"weight": torch.zeros(1)}
            actor.token_stats(part.sequences, micro_batches, "teacher", 1.0)
            assert module._fp8_workspaces, "copies were dropped though nobody else needs the memory"
        actor.update_ema_teacher(0.5)
    at_rest = sum(t.untyped_storage().nbytes() for t in _state(actor))
    actor.save(folder)
    actor.load(folder)
    with actor._offloaded.at_hand("optimizer", "teacher"):
        state = [tensor.detach().clone() for tensor in _state(actor)]
    report = actor.update(part, micro_batches)
    stats = actor.token_stats(part.sequences, micro_batches, "reference", 1.0)
    weights = [param.detach().clone() for chunk in actor.policy for param in chunk.parameters()]
    described = actor.describe()
    actor.shutdown()
    return {
        "state": state,
        "weights": weights,
        "report": report,
        "reference": None if stats is None else stats.logprobs,
        "gradients held": held,
        "copies kept": copies_kept,
        "state held": at_rest,
        "described": described,
    }


def _state(actor: Any) -> list[torch.Tensor]:
    from megatron_coreward.actor.shards import main_shards

    moments = [moment for shard in main_shards(actor.optimizer) for moment in shard.state.values() if moment.ndim]
    return [*moments, *actor.teacher.values, *actor.teacher.compensations]


def by_packing(rank: int, path: Path, port: int, batch: TrainBatch, tokens: int) -> list[dict[str, Any]]:
    """Statistics, loss and gradients of the batch packed end to end, and padded: one sequence a pack."""
    actor = start(rank, make_setup(path, {"tokens_per_microbatch": tokens}), port)
    rows = tuple(range(len(batch)))
    packed = share_of(actor, batch.sequences)
    assert packed.rows == rows
    padded = MicroBatchPlan(rows, tuple((row,) for row in rows), max(batch.sequences.lengths) + 7)
    results = []
    for micro_batches in (packed, padded):
        stats = actor.token_stats(batch.sequences, micro_batches, "policy", 0.7)
        sums = actor.accumulate(batch, micro_batches)
        results.append(
            {
                "packs": len(micro_batches.packs),
                "stats": [np.concatenate(v) for v in (stats.logprobs, stats.entropy, stats.self_certainty)],
                "loss": {key: float(sum(s[key] for s in sums)) for key in sums[0] if not key.startswith("max:")},
                "gradients": whole_gradients(actor),
            }
        )
    actor.shutdown()
    return results
