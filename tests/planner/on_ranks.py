"""What tests of the planner run on the ranks of real actors."""

from pathlib import Path
from typing import Any

import torch

from megatron_coreward.actor.setup import ActorSetup
from tests.actor.on_ranks import make_setup, start


def _bytes(tensors: Any) -> int:
    """Of storage: tensors that share memory count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def allocated(
    rank: int, cases: list[tuple[Path, str, dict[str, Any]]], ports: list[int]
) -> list[tuple[int, int, int, dict[str, int]]]:
    """For each (model, dtype, layout): pipeline, data-parallel and expert-data-parallel rank, and the bytes of every
    part that an actor has allocated there."""
    from megatron_coreward.actor.optimizer import MOMENTS
    from megatron_coreward.actor.shards import main_shards

    found = []
    for (path, dtype, layout), port in zip(cases, ports, strict=True):
        setup: ActorSetup = make_setup(path, layout, dtype=dtype)
        actor = start(rank, setup, port)
        buffers = [b for chunk in actor.policy for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
        shards = list(main_shards(actor.optimizer))
        weights = [param for chunk in actor.policy for param in chunk.parameters()]
        policy = {t.untyped_storage().data_ptr() for t in weights}
        parts = {
            "weights": _bytes(weights),
            "gradients": _bytes(b.grad_data for b in buffers),
            "main": _bytes(s.value for s in shards if s.value.untyped_storage().data_ptr() not in policy),
            "moments": _bytes(s.state[name] for s in shards for name in MOMENTS),
            "teacher": _bytes([*actor.teacher.values, *actor.teacher.compensations]),
        }
        for name, frozen in actor.frozen.items():
            parts[f"{name}_model"] = _bytes(p for chunk in frozen.chunks for p in chunk.parameters())
        assert all(torch.is_tensor(b.param_data) for b in buffers)
        found.append((actor.ranks.pp_rank, actor.ranks.dp_rank, actor.ranks.expert_dp_rank, parts))
        actor.shutdown()
    return found
