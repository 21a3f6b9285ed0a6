"""Who receives: a worker's end of a weight sync, one file a transport over one base; and vLLM's end (`engine`)."""

import torch

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.receivers.base import Receiver
from megatron_coreward.weights.receivers.cuda_ipc import CudaIpcReceiver
from megatron_coreward.weights.receivers.point_to_point import PointToPointReceiver
from megatron_coreward.weights.receivers.shared_memory import SharedMemoryReceiver
from megatron_coreward.weights.schedule import Schedule
from megatron_coreward.weights.spec import TransferSpec, Transport

__all__ = ["Receiver", "open_receiver"]

_RECEIVERS: dict[Transport, type[Receiver]] = {
    "shared_memory": SharedMemoryReceiver,
    "gloo": PointToPointReceiver,
    "nccl": PointToPointReceiver,
    "ipc": CudaIpcReceiver,
}


def open_receiver(spec: TransferSpec, arch: Architecture, engine: int, worker: int, device: torch.device) -> Receiver:
    """A worker's end of all weight syncs of a spec.

    Raises:
        RunError: the store cannot be reached.
    """
    of_messages = device if spec.transport in ("ipc", "nccl") else torch.device("cpu")
    return _RECEIVERS[spec.transport](spec, Schedule.of(spec, arch), engine, worker, of_messages)
