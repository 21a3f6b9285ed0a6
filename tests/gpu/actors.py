"""Actors for the GPU tests: one rank in a process of its own, so that nothing of a former one is left on the card."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_coreward.types import Sequences, TrainBatch
from tests.actor.on_ranks import make_setup, share_of, start, whole_gradients

PROMPT = 16


def make_batch(vocab_size: int, count: int = 16) -> TrainBatch:
    rng = np.random.default_rng(0)
    lengths = rng.integers(PROMPT + 8, 120, count)
    ids = [rng.integers(1, vocab_size, n).astype(np.int32) for n in lengths]
    tokens = int((lengths - PROMPT).sum())
    return TrainBatch(
        sequences=Sequences(ids, np.full(count, PROMPT, dtype=np.int32)),
        advantages=rng.normal(size=count).astype(np.float32),
        token_weights=np.full(count, 1 / tokens, dtype=np.float32),
        rollout_logprobs=None,
        old_logprobs=None,
        reference_logprobs=None,
        kl_coef=0.0,
    )


def compute(rank: int, path: Path, layout: dict[str, Any], dtype: str, port: int, batch: TrainBatch) -> dict[str, Any]:
    """Log-probs and gradients of a batch, and what they were computed with.

    Delayed scaling is asked after an update: before, its scales are not known (`MegatronActor.update`).
    """
    import torch

    actor = start(rank, make_setup(path, {"tokens_per_microbatch": 512, "lr": 1e-9, **layout}, dtype=dtype), port)
    micro_batches = share_of(actor, batch.sequences)
    if layout.get("fp8") == "delayed":
        actor.update(batch, micro_batches)
    stats = actor.token_stats(batch.sequences, micro_batches, "policy", 1.0)
    sums = actor.accumulate(batch, micro_batches)
    found = {
        "logprobs": np.concatenate(stats.logprobs),
        "loss": float(sum(s["loss/total"] for s in sums)),
        "nll": float(sum(s["nll"] for s in sums)),  # of the pass with a gradient
        "gradients": {name: pieces[0][1] for name, pieces in whole_gradients(actor).items() if len(pieces) == 1},
        "described": actor.describe(),
        "peak": torch.cuda.max_memory_allocated(),
    }
    actor.shutdown()
    return found


def take_turns(rank: int, path: Path, port: int, batch: TrainBatch) -> dict[str, Any]:
    """What an actor holds before, while and after its state is away, and an update on either side."""
    import torch

    actor = start(rank, make_setup(path, {"tokens_per_microbatch": 512}, dtype="bfloat16"), port)
    micro_batches = share_of(actor, batch.sequences)
    reports = [actor.update(batch, micro_batches)]
    held = [torch.cuda.memory_allocated()]
    offloaded = actor.offload()
    held.append(torch.cuda.memory_allocated())
    actor.onload()
    held.append(torch.cuda.memory_allocated())
    reports.append(actor.update(batch, micro_batches))
    state = sum(s.value.nbytes * 3 for s in _shards(actor)) + sum(v.nbytes * 2 for v in actor.teacher.values)
    actor.shutdown()
    return {"held": held, "freed": offloaded.freed, "state": state, "reports": reports}


def _shards(actor: Any) -> list[Any]:
    from megatron_coreward.actor.shards import main_shards

    return list(main_shards(actor.optimizer))
