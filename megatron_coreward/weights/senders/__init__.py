"""Who sends: a rank's end of a weight sync, one file a transport over one base."""

from collections.abc import Mapping, Sequence

import torch

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.types import Role
from megatron_coreward.weights.meeting import give_up
from megatron_coreward.weights.schedule import Schedule
from megatron_coreward.weights.senders.base import LocalBlock, Sender
from megatron_coreward.weights.senders.cuda_ipc import CudaIpcSender
from megatron_coreward.weights.senders.point_to_point import PointToPointSender
from megatron_coreward.weights.senders.shared_memory import SharedMemorySender
from megatron_coreward.weights.spec import TransferSpec, Transport

__all__ = ["LocalBlock", "Sender", "open_sender"]

_SENDERS: dict[Transport, type[Sender]] = {
    "shared_memory": SharedMemorySender,
    "gloo": PointToPointSender,
    "nccl": PointToPointSender,
    "ipc": CudaIpcSender,
}


def open_sender(
    spec: TransferSpec,
    arch: Architecture,
    rank: int,
    blocks: Mapping[Role, Sequence[LocalBlock]],
    device: torch.device,
) -> Sender:
    """A rank's end of all weight syncs of a spec. All ranks open theirs at the same time.

    Args:
        spec: with the place where everybody meets.
        blocks: everything that this rank holds of each set of weights.
        device: of the rank.

    Raises:
        ValueError: the plan wants something from this rank that it does not hold.
        RunError: the store cannot be reached, there is too little shared memory, or another rank has given up.
    """
    of_messages = device if spec.transport in ("ipc", "nccl") else torch.device("cpu")
    try:
        sender = _SENDERS[spec.transport](spec, Schedule.of(spec, arch), rank, blocks, of_messages)
    except Exception as error:
        give_up(spec, f"rank {rank} of the actor: {error}")  # the others may open theirs already, and wait for it
        raise
    try:
        sender.open()
    except BaseException as error:
        sender.give_up(str(error))
        raise
    return sender
