"""Memory of a GPU that two processes on it share (CUDA IPC)."""

import base64
import json
from typing import Any

import torch

# The arguments of torch's `rebuild_cuda_tensor` that say which memory is meant; the others follow from its being flat
# bytes. Numbers, a flag, and bytes that only the driver of the card understands.
_NUMBERS = {"storage_size": 8, "storage_offset": 9, "counter_offset": 12, "event_needed": 14}
_BYTES = {"storage": 7, "counter": 11, "event": 13}


def gpu_name(device: torch.device) -> str:
    """A name of the card itself, whatever number a process knows it by."""
    return str(torch.cuda.get_device_properties(device).uuid)


def export_memory(memory: torch.Tensor) -> str:
    """What another process on the same GPU maps the memory with, as text. It must live as long as its users: nothing
    but the caller keeps it.

    Args:
        memory: [bytes], a tensor of its own, no view.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(memory)  # type: ignore[no-untyped-call]
    # Torch counts an export as a use, and keeps the memory until whoever maps it lets go. One that dies, or never
    # comes because the weight sync has failed, would keep it for ever.
    torch.UntypedStorage._release_ipc_counter_cuda(arguments[_BYTES["counter"]], arguments[_NUMBERS["counter_offset"]])
    numbers = {name: arguments[place] for name, place in _NUMBERS.items()}
    raw = {name: base64.b64encode(arguments[place]).decode() for name, place in _BYTES.items()}
    return json.dumps({"gpu": gpu_name(memory.device), "nbytes": memory.nbytes, **numbers, **raw})


def import_memory(exported: str, device: torch.device) -> torch.Tensor:
    """Maps what another process on the same GPU exported. Each export may be mapped once.

    Raises:
        ValueError: it was exported from another GPU.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    handle = json.loads(exported)
    if handle["gpu"] != gpu_name(device):
        raise ValueError(f"the memory is on GPU {handle['gpu']}, this process on GPU {gpu_name(device)}")
    known: list[Any] = [torch.Tensor, (handle["nbytes"],), (1,), 0, torch.UntypedStorage, torch.uint8, device.index]
    arguments = [*known, *[None] * 8]
    for name, place in _NUMBERS.items():
        arguments[place] = handle[name]
    for name, place in _BYTES.items():
        arguments[place] = base64.b64decode(handle[name])
    arguments[10] = False  # requires_grad
    return rebuild_cuda_tensor(*arguments)  # type: ignore[no-any-return,no-untyped-call]
