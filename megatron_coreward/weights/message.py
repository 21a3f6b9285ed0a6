"""A message in memory: a header that says what it is, then the parts, flat and one after the other.

The header travels with the bytes, over every transport, so that whoever loads them knows that they are complete and of
the right weights.
"""

import zlib
from collections.abc import Sequence

import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.schedule import HEADER_BYTES, Message

_MAGIC = 0x636F7265776172
_FIELDS = 5  # 64-bit integers: magic, version, bucket, bytes of the parts, checksum (-1: none)


def crc32(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's elements, row by row."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def parts_of(memory: torch.Tensor, message: Message, dtype: torch.dtype) -> torch.Tensor:
    """The parts of a message, flat, as a view of its bytes."""
    numel = sum(part.numel for part in message.parts)
    return memory[HEADER_BYTES : HEADER_BYTES + numel * dtype.itemsize].view(dtype)


@torch.no_grad()
def pack(
    memory: torch.Tensor, message: Message, values: Sequence[torch.Tensor], version: int, bucket: int, checksum: bool
) -> None:
    """Writes a message.

    Args:
        memory: [message.nbytes] bytes, on any device.
        values: of the parts, on any device, of any float dtype and strides.
        version: number of the weights.
        checksum: let the receiver compare one.
    """
    payload = parts_of(memory, message, values[0].dtype)
    position = 0
    for value in values:
        payload[position : position + value.numel()].view(value.shape).copy_(value)
        position += value.numel()
    found = crc32(payload) if checksum else -1
    header = torch.tensor([_MAGIC, version, bucket, payload.nbytes, found], dtype=torch.int64)
    memory[: 8 * _FIELDS].view(torch.int64).copy_(header)


def unpack(memory: torch.Tensor, message: Message, version: int, bucket: int, dtype: torch.dtype) -> torch.Tensor:
    """The parts of a message that has arrived, flat, as a view of its bytes.

    Raises:
        RunError: it is another message, of other weights, or was damaged on the way.
    """
    magic, *found, nbytes, checksum = memory[: 8 * _FIELDS].view(torch.int64).tolist()
    payload = parts_of(memory, message, dtype)
    if magic != _MAGIC:
        raise RunError(f"what should be bucket {bucket} of rank {message.rank} is no message of a weight sync")
    if found != [version, bucket] or nbytes != payload.nbytes:
        raise RunError(
            f"rank {message.rank} sent bucket {found[1]} of version {found[0]} with {nbytes} bytes, expected bucket "
            f"{bucket} of version {version} with {payload.nbytes}"
        )
    if checksum >= 0 and crc32(payload) != checksum:
        raise RunError(f"what rank {message.rank} sent of bucket {bucket} arrived damaged: its checksum differs")
    return payload
