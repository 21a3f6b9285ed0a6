"""What tests/actor/test_saving.py runs on the ranks."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_coreward.types import TrainBatch
from tests.actor.on_ranks import make_setup, share_of, start


def _state(actor: Any) -> list[torch.Tensor]:
    """Weights, main parameters, moments, teacher: copies."""
    from megatron_coreward.actor.shards import main_shards

    shards = [t for s in main_shards(actor.optimizer) for t in (s.value, s.state["exp_avg"], s.state["exp_avg_sq"])]
    weights = [param for chunk in actor.policy for param in chunk.parameters()]
    return [t.detach().clone() for t in (*weights, *shards, *actor.teacher.values, *actor.teacher.compensations)]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def save_while_training(
    rank: int, path: Path, layout: dict[str, Any], port: int, batch: TrainBatch, folder: Path
) -> dict[str, Any]:
    """Two updates and a move of the teacher between the beginning of a save and its end."""
    from megatron_coreward.actor.saving import hash_file

    actor = start(rank, make_setup(path, layout), port)
    micro_batches = share_of(actor, batch.sequences)
    part = batch.select(micro_batches.rows)
    actor.update(part, micro_batches)
    actor.update_ema_teacher(0.5)
    before = _state(actor)
    if rank == 0:
        (folder / "state").mkdir()
    torch.distributed.barrier()
    actor.begin_save(folder / "state")
    request = actor._saving._request
    held = sum(len(tensors) for _, _, (_, tensors) in request.async_fn_args[1]) if request.async_fn else 0
    children = len(psutil.Process().children(recursive=True))
    for _ in range(2):
        actor.update(part, micro_batches)
        actor.update_ema_teacher(0.5)
    moved = not _same(before, _state(actor))
    hashes = actor.finish_save()
    children += len(psutil.Process().children(recursive=True))
    right = all(
        ((folder / "state" / name).stat().st_size, hash_file(folder / "state" / name)) == tuple(entry)
        for name, entry in hashes.items()
    )
    actor.load(folder / "state")
    restored = _same(before, _state(actor))
    actor.shutdown()
    return {
        "held": held,
        "children": children,
        "same as at the beginning": moved and restored,
        "hashes are right": right,
    }


def save_to_full_disk(rank: int, path: Path, port: int, folder: Path) -> str:
    """The file of rank 1 lies on a device that is always full. Returns the error that this rank saw."""
    actor = start(rank, make_setup(path, {"tensor_parallel": 2}), port)
    if rank == 0:
        for name in ("state", "again"):
            (folder / name).mkdir()
        (folder / "state" / "__1_0.distcp").symlink_to("/dev/full")
    torch.distributed.barrier()
    actor.begin_save(folder / "state")
    try:
        actor.finish_save()
        seen = "no error"
    except OSError as error:
        seen = str(error)
    actor.save(folder / "again")
    actor.load(folder / "again")
    actor.shutdown()
    return seen


def save_fp8_weights(rank: int, path: Path, port: int, folder: Path) -> dict[str, Any]:
    """Two replicas save, to which every weight is in FP8; then they read it where no weight is."""
    from megatron_coreward.actor import state

    actor = start(rank, make_setup(path, {"data_parallel": 2}), port)
    before = _state(actor)
    if rank == 0:
        (folder / "state").mkdir()
    torch.distributed.barrier()
    weights = {param.data_ptr() for chunk in actor.policy for param in chunk.parameters()}
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def dequantised(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        value = tensor.detach().clone()
        made.append(weakref.ref(value))
        most = max(most, sum(alive() is not None for alive in made))
        return value

    names = "is_float8tensor", "dequantize_fp8_tensor"
    real = [getattr(state, name) for name in names]
    state.is_float8tensor, state.dequantize_fp8_tensor = lambda t: t.data_ptr() in weights, dequantised  # type: ignore[assignment]
    actor.save(folder / "state")
    for name, function in zip(names, real, strict=True):
        setattr(state, name, function)
    for chunk in actor.policy:
        for param in chunk.parameters():
            param.data.zero_()
    actor.load(folder / "state")
    outcome = {"alive at once": most, "restored": _same(before, _state(actor))}
    actor.shutdown()
    return outcome


def skip_bad_gradient(rank: int, path: Path, port: int, batch: TrainBatch) -> dict[str, Any]:
    """An update with an infinite advantage where such updates are skipped, then a sound one."""
    actor = start(rank, make_setup(path, {}, skip_nonfinite_gradients=True), port)
    micro_batches = share_of(actor, batch.sequences)
    actor.update(batch.select(micro_batches.rows), micro_batches)
    before = _state(actor)
    bad = dataclasses.replace(batch, advantages=np.full(len(batch), np.inf, dtype=np.float32)).select(
        micro_batches.rows
    )
    report = actor.update(bad, micro_batches)
    after = _state(actor)
    num_weights = len(list(actor.policy[0].parameters()))
    sound = actor.update(batch.select(micro_batches.rows), micro_batches)
    outcome = {
        "weights as before": _same(before[:num_weights], after[:num_weights]),
        "moments as before": _same(before[num_weights:], after[num_weights:]),
        "reported": report["max:skipped"],
        "next update is finite": bool(np.isfinite(sound["grad_norm"])) and not _same(after, _state(actor)),
    }
    actor.shutdown()
    return outcome
