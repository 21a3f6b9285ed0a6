"""What the tests of `weights.device` run on ranks."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_coreward.weights import device
from megatron_coreward.weights.buckets import TensorMeta
from megatron_coreward.weights.send import LocalBlock

METAS = [
    TensorMeta("by_rows", (5, 4), "float32"),
    TensorMeta("by_columns", (3, 6), "bfloat16"),
    TensorMeta("whole", (7,), "float32"),
    TensorMeta("of_rank_0", (2, 2), "bfloat16"),
]
ALL = slice(None)


def full(name: str) -> torch.Tensor:
    """Values of all kinds: what a sum of floats would change is among them."""
    meta = next(m for m in METAS if m.name == name)
    values = torch.randn(meta.shape, generator=torch.Generator().manual_seed(len(name)))
    values.view(-1)[:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    return values.to(getattr(torch, meta.dtype))


def blocks_of(rank: int, num_ranks: int) -> list[LocalBlock]:
    """The tensors cut over the ranks, in different ways."""

    def block(name: str, *index: slice) -> LocalBlock:
        return LocalBlock(name, index, lambda: full(name)[index])

    if num_ranks == 1:
        return [block(meta.name, *(ALL for _ in meta.shape)) for meta in METAS]
    if rank == 0:
        held = [block("by_rows", slice(0, 3), ALL), block("by_columns", ALL, slice(0, 2))]
        return [*held, block("of_rank_0", ALL, ALL)]
    return [block("by_rows", slice(3, 5), ALL), block("by_columns", ALL, slice(2, 6)), block("whole", ALL)]


def sender_of(rank: int, num_ranks: int, bucket_bytes: int) -> device.DeviceSender:
    staging = device.Staging(device.largest_bucket(METAS, bucket_bytes), torch.device("cpu"))
    return device.DeviceSender(blocks_of(rank, num_ranks), METAS, bucket_bytes, rank, num_ranks, staging)


def send(rank: int, num_ranks: int, port: int, bucket_bytes: int) -> list[dict[str, Any]]:
    """Fills every bucket twice, as two versions. Returns marks, bytes of all tensors, and checksums."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    sender = sender_of(rank, num_ranks, bucket_bytes)
    found = []
    for version in (6, 7):
        for number, bucket in enumerate(sender.buckets):
            hashes = sender.write(number, version, hashes=True)
            memory = sender._staging.slot(number)
            found.append(
                {
                    "mark": device.read_mark(memory, bucket.nbytes),
                    "bytes": {e.meta.name: as_bytes(device.tensor_in(memory, e)) for e in bucket.entries},
                    "hashes": [(h.name, h.bounds, h.crc32) for h in hashes],
                }
            )
    dist.destroy_process_group()
    return found


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
