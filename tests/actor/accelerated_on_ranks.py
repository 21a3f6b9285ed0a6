"""What `test_accelerated.py` runs on ranks."""

from pathlib import Path
from typing import Any

import torch

from megatron_coreward.types import TrainBatch
from tests.actor.on_ranks import make_setup, share_of, start


def update_with_cold_scales(rank: int, path: Path, port: int, batch: TrainBatch, cold: bool) -> dict[str, Any]:
    """One update, as under a recipe whose scales are not known yet, or not; and how often a gradient was computed."""
    from megatron_coreward.actor.optimizer import optimizer_parts

    actor = start(rank, make_setup(path, {}), port)
    micro_batches, passes = share_of(actor, batch.sequences), []
    accumulate = actor.accumulate
    actor.accumulate = lambda *args: passes.append(1) or accumulate(*args)
    actor._cold_scales = cold
    reports = [actor.update(batch, micro_batches) for _ in range(2)]
    weights = [param.detach().clone() for param in actor.policy[0].parameters()]
    actor.shutdown()
    together = any(
        g["foreach"] is not False for p in optimizer_parts(actor.optimizer) for g in p.optimizer.param_groups
    )
    return {"passes": len(passes), "reports": reports, "weights": weights, "Adam steps together": together}


def scoring_under(rank: int, path: Path, port: int, batch: TrainBatch, recipe: str) -> dict[str, Any]:
    """What Megatron's config says of FP8 while each set of weights is scored, and afterwards."""
    actor = start(rank, make_setup(path, {}), port)
    micro_batches, seen = share_of(actor, batch.sequences), {}
    config = actor.policy[0].module.config
    config.fp8_recipe = recipe
    for weights in ("policy", "reference"):
        config.fp8 = "hybrid"
        with actor._bf16_under_delayed_scaling(weights):
            seen[weights] = config.fp8
        seen[f"{weights} after"] = config.fp8
    config.fp8 = None
    seen["really"] = actor.token_stats(batch.sequences, micro_batches, "policy", 1.0) is not None
    actor.shutdown()
    return seen


def checkpoint_keys(rank: int, path: Path, port: int, folder: Path) -> dict[str, Any]:
    """Keys of a saved state, of a model whose layers have an extra state that is not empty, as under FP8."""
    from torch.distributed.checkpoint import FileSystemReader

    actor = start(rank, make_setup(path, {}), port)
    scaled = actor.policy[0].module.decoder.layers[0].mlp.linear_fc1
    extra: list[Any] = []
    state = {"get_extra_state": lambda self: torch.ones(5, dtype=torch.uint8)}
    state |= {"set_extra_state": lambda self, value: extra.append(value)}
    scaled.__class__ = type("Scaled", (type(scaled),), state)
    has = any("_extra_state" in key for key in actor.policy[0].module.state_dict())
    actor.save(folder)
    actor.load(folder)
    actor.shutdown()
    return {
        "has": has,
        "extra": extra,
        "keys": list(FileSystemReader(folder).read_metadata().state_dict_metadata),
    }
