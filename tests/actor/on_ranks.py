"""What the actor tests run on the ranks. Every function takes the rank first and returns plain data."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_coreward.actor.packing import micro_batch_plans, plan_packs
from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.config.accelerator import sequence_multiple, token_alignment
from megatron_coreward.config.schema import ActorSettings, LossSettings
from megatron_coreward.types import Sequences, TrainBatch


def make_setup(path: Path, layout: dict[str, Any], **changes: Any) -> ActorSetup:
    settings = {"tokens_per_microbatch": 128, "lr": 1e-2, "lr_warmup": 0.0, "clip_grad": 0.0, **layout}
    setup = ActorSetup(
        settings=ActorSettings(**settings),
        loss=LossSettings(kl_coef=0.1, kl_reference="frozen"),
        hf_path=path,
        megatron_path=None,
        dtype="float32",
        temperature=1.0,
        max_sequence_length=128,
        total_updates=4,
        seed=1,
        teacher=True,
        frozen_reference=True,
    )
    return dataclasses.replace(setup, **changes)


def start(rank: int, setup: ActorSetup, port: int) -> Any:
    from megatron_coreward.actor.actor import MegatronActor

    torch.set_num_threads(1)
    return MegatronActor(setup, rank, "127.0.0.1", port)


def share_of(actor: Any, sequences: Sequences) -> Any:
    s = actor.setup.settings
    multiple = s.pipeline_parallel if s.virtual_pipeline > 1 else 1
    align, pad = token_alignment(s), sequence_multiple(s)
    plan = plan_packs(sequences.lengths, s.data_parallel, s.tokens_per_microbatch, multiple, align, pad)
    return micro_batch_plans(plan)[actor.ranks.dp_rank]


def whole_gradients(actor: Any) -> dict[str, list[tuple[Any, np.ndarray]]]:
    """HF name -> blocks of the gradient that this rank holds, data-parallel shards gathered."""
    import torch.distributed as dist

    from megatron_coreward.actor.hf_weights import _tensor_parallel, global_parameters
    from megatron_coreward.weights.mapping import blocks

    for wrapped in actor.policy:
        for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
            if buffer.data_parallel_world_size > 1:
                for bucket in buffer.buckets:
                    rank = buffer.data_parallel_group.rank()
                    own = bucket.grad_data.view(buffer.data_parallel_world_size, -1)[rank].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=buffer.data_parallel_group)
    found: dict[str, list[tuple[Any, np.ndarray]]] = {}
    for name, param in global_parameters([c.module for c in actor.policy], actor.arch, actor.ranks):
        if name == "output_layer.weight" and actor.arch.tied:
            continue
        for block in blocks(name, actor.arch, *_tensor_parallel(name, actor.ranks)):
            piece = param.main_grad[block.shard_index].float().cpu().numpy().copy()
            found.setdefault(block.hf_name, []).append((block.hf_index, piece))
    return found


def gradients_and_stats(
    rank: int, path: Path, layouts: list[dict[str, Any]], ports: list[int], batch: TrainBatch
) -> list[dict[str, Any]]:
    """For each layout in turn: statistics of the batch's sequences and the gradient of its loss."""
    results = []
    for layout, port in zip(layouts, ports, strict=True):
        actor = start(rank, make_setup(path, layout), port)
        micro_batches = share_of(actor, batch.sequences)
        part = batch.select(micro_batches.rows)
        stats = actor.token_stats(part.sequences, micro_batches, "policy", 1.0)
        sums = actor.accumulate(part, micro_batches)
        loss = None if sums is None or not actor.is_output_rank else float(sum(s["loss/total"] for s in sums))
        actor.optimizer.prepare_grads()
        results.append(
            {
                "stats": None if stats is None else (micro_batches.rows, stats),
                "gradients": whole_gradients(actor),
                "loss": loss,
                "norm": float(actor.optimizer.get_grad_norm()),
            }
        )
        actor.shutdown()
    return results


def train_and_save(rank: int, path: Path, layout: dict[str, Any], port: int, batch: TrainBatch, folder: Path) -> Any:
    """Two updates with a teacher that follows, a checkpoint and an export, then one more update."""
    actor = start(rank, make_setup(path, layout), port)
    micro_batches = share_of(actor, batch.sequences)
    part = batch.select(micro_batches.rows)
    for _ in range(2):
        actor.update(part, micro_batches)
        actor.update_ema_teacher(0.5)
    actor.save(folder / "state")
    actor.export_hf("policy", folder / "hf")
    actor.export_hf("teacher", folder / "hf_teacher")
    stats = {w: actor.token_stats(part.sequences, micro_batches, w, 1.0) for w in ("policy", "teacher", "reference")}
    report = actor.update(part, micro_batches)
    actor.update_ema_teacher(0.5)
    after = actor.token_stats(part.sequences, micro_batches, "teacher", 1.0)
    actor.shutdown()
    return micro_batches.rows, stats, report, after


def resume(
    rank: int, path: Path, layouts: list[dict[str, Any]], ports: list[int], batch: TrainBatch, folder: Path
) -> Any:
    """Under each layout: load the checkpoint and go on with one update."""
    results = []
    for layout, port in zip(layouts, ports, strict=True):
        actor = start(rank, make_setup(path, layout), port)
        actor.load(folder / "state")
        micro_batches = share_of(actor, batch.sequences)
        part = batch.select(micro_batches.rows)
        stats = {
            w: actor.token_stats(part.sequences, micro_batches, w, 1.0) for w in ("policy", "teacher", "reference")
        }
        report = actor.update(part, micro_batches)
        actor.update_ema_teacher(0.5)
        after = actor.token_stats(part.sequences, micro_batches, "teacher", 1.0)
        actor.shutdown()
        results.append((micro_batches.rows, stats, report, after))
    return results


def refuses_bad_gradient(rank: int, path: Path, port: int, batch: TrainBatch) -> tuple[bool, bool]:
    """Whether an update with an infinite advantage raises, and whether the weights are as before."""
    actor = start(rank, make_setup(path, {}), port)
    micro_batches = share_of(actor, batch.sequences)
    before = [param.detach().clone() for param in actor.policy[0].parameters()]
    bad = dataclasses.replace(batch, advantages=np.full(len(batch), np.inf, dtype=np.float32)).select(
        micro_batches.rows
    )
    try:
        actor.update(bad, micro_batches)
        raised = False
    except FloatingPointError:
        raised = True
    same = all(torch.equal(a, b) for a, b in zip(before, actor.policy[0].parameters(), strict=True))
    actor.shutdown()
    return raised, same


def stats_of_converted(
    rank: int, checkpoint: Path, layouts: list[dict[str, Any]], ports: list[int], sequences: Sequences
) -> list[tuple[tuple[int, ...], Any, list[str]]]:
    """For each layout in turn, with a converted checkpoint: the rows and statistics of the sequences, and the names of
    parameters into which Megatron's own reader puts other values than ours."""
    results = []
    for layout, port in zip(layouts, ports, strict=True):
        setup = make_setup(checkpoint / "hf", layout, megatron_path=checkpoint, teacher=False, frozen_reference=False)
        actor = start(rank, setup, port)
        micro_batches = share_of(actor, sequences)
        stats = actor.token_stats(sequences.select(micro_batches.rows), micro_batches, "policy", 1.0)
        results.append((micro_batches.rows, stats, _unlike_megatrons_reader(actor, checkpoint)))
        actor.shutdown()
    return results


@torch.no_grad()
def _unlike_megatrons_reader(actor: Any, checkpoint: Path) -> list[str]:
    from megatron.core import dist_checkpointing

    chunks = {f"model{i}": wrapped.module for i, wrapped in enumerate(actor.policy)}
    ours = {(k, name): param.clone() for k, chunk in chunks.items() for name, param in chunk.named_parameters()}
    assert all(bool(param.any()) for param in ours.values())
    for chunk in chunks.values():
        for param in chunk.parameters():
            param.zero_()
    loaded = dist_checkpointing.load({k: chunk.sharded_state_dict() for k, chunk in chunks.items()}, str(checkpoint))
    for k, chunk in chunks.items():
        chunk.load_state_dict(loaded[k])
    return [name for (k, name), param in ours.items() if not torch.equal(param, chunks[k].get_parameter(name))]
