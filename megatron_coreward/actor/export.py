"""The actor's weights as a Hugging Face model directory: whole or not at all."""

import datetime
import os
import shutil
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_coreward.actor.hf_weights import owned_blocks
from megatron_coreward.actor.parallel import ParallelRanks
from megatron_coreward.checkpoint.hf_description import copy_description
from megatron_coreward.checkpoint.manifest import MANIFEST
from megatron_coreward.checkpoint.new_directory import fsync_tree
from megatron_coreward.checkpoint.safetensors_files import HfWriter
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.mapping import hf_tensors

MAX_FILE_BYTES = 4 * 2**30
# A rank waits for its first tensor to be asked for, or for the last file, almost as long as the export takes: for a
# large model on a slow disk that is longer than the limit of all other collectives.
TIMEOUT = datetime.timedelta(days=1)


@torch.no_grad()
def export_hf(chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks, source: Path, target: Path) -> None:
    """Gathers tensor by tensor to rank 0, which writes files of at most 4 GiB; called on all ranks.

    Config, generation config and tokenizer files are those of `source`. An existing `target` is replaced in the end.
    """
    shapes = hf_tensors(arch)
    dtype = next(iter(chunks[0].parameters())).dtype
    owned = owned_blocks(chunks, arch, ranks)
    mine = {name: [b for b in owned if b.name == name] for name in {b.name for b in owned}}
    group = dist.new_group(timeout=TIMEOUT, backend="gloo")  # a NCCL pair for each rank would take memory
    where: list[dict[str, list[tuple[slice, ...]]]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(where, {name: [b.index for b in blocks] for name, blocks in mine.items()}, group)

    if ranks.rank != 0:
        for name in shapes:
            for block in mine.get(name, []):
                dist.send(block.read().cpu().contiguous(), dst=0, group=group)
        dist.barrier(group)
        dist.destroy_process_group(group)
        return

    partial = partial_directory(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with closing(HfWriter(partial, shapes, dict.fromkeys(shapes, dtype), MAX_FILE_BYTES)) as writer:
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtype)
            for rank in range(ranks.world_size):
                if rank == 0:
                    for block in mine.get(name, []):
                        tensor[block.index] = block.read().cpu()
                    continue
                for index in where[rank].get(name, []):
                    received = torch.empty(tensor[index].shape, dtype=dtype)
                    dist.recv(received, src=rank, group=group)
                    tensor[index] = received
            writer.write_rows(name, 0, tensor)
    copy_description(source, partial, dtype)
    (partial / MANIFEST).unlink(missing_ok=True)  # of the weights that training started from
    fsync_tree(partial)
    former = target.with_name(f".{target.name}.removed")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)  # the name goes first: a kill leaves no model with holes under it
    os.replace(partial, target)
    shutil.rmtree(former, ignore_errors=True)
    dist.barrier(group)
    dist.destroy_process_group(group)


def partial_directory(target: Path) -> Path:
    """Where a model is written until it is complete."""
    return target.with_name(f".{target.name}.partial")
