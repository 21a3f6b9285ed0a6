"""What tests/actor/test_objectives.py runs on the ranks."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_coreward.config.schema import LossSettings
from megatron_coreward.types import TrainBatch
from tests.actor.on_ranks import make_setup, share_of, start, whole_gradients


def loss_and_gradients(
    rank: int,
    path: Path,
    losses: list[LossSettings],
    layouts: list[dict[str, Any]],
    ports: list[int],
    batch: TrainBatch,
) -> list[list[tuple[float | None, dict[str, Any]]]]:
    """For each layout, and in it for each of the settings: this rank's part of the loss and of the gradient."""
    results = []
    for layout, port in zip(layouts, ports, strict=True):
        actor = start(rank, make_setup(path, layout, loss=losses[0]), port)
        micro_batches = share_of(actor, batch.sequences)
        part = batch.select(micro_batches.rows)
        of_layout = []
        for loss in losses:
            actor.setup = dataclasses.replace(actor.setup, loss=loss)
            sums = actor.accumulate(part, micro_batches)
            total = None if sums is None or not actor.is_output_rank else float(sum(s["loss/total"] for s in sums))
            actor.optimizer.prepare_grads()
            of_layout.append((total, whole_gradients(actor)))
        actor.shutdown()
        results.append(of_layout)
    return results
