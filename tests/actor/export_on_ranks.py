"""What the tests of exports run on the ranks. Every function takes the rank first and returns plain data."""

import datetime
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_coreward.actor import export
from megatron_coreward.weights.senders import LocalBlock

TENSORS = {"cut": torch.arange(12.0).view(4, 3), "whole": torch.arange(5.0)}


def slowly(rank: int, port: int, limit_s: float, folder: Path) -> None:
    """Exports two tensors, of which the second rank needs longer to read its half than other collectives may take."""
    limit = datetime.timedelta(seconds=limit_s)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", limit, world_size=2, rank=rank)

    def half() -> torch.Tensor:
        time.sleep(2 * limit_s * rank)
        return TENSORS["cut"][2 * rank : 2 * rank + 2]

    blocks = [LocalBlock("cut", (slice(2 * rank, 2 * rank + 2), slice(0, 3)), half)]
    if rank == 0:
        blocks.append(LocalBlock("whole", (slice(0, 5),), lambda: TENSORS["whole"]))
    instead: dict[str, Any] = {
        "hf_tensors": lambda arch: {name: tuple(tensor.shape) for name, tensor in TENSORS.items()},
        "owned_blocks": lambda *arguments: blocks,
        "copy_description": lambda *arguments: None,
    }
    for name, function in instead.items():
        setattr(export, name, function)
    ranks: Any = SimpleNamespace(rank=rank, world_size=2)
    model: Any = torch.nn.Linear(1, 1)
    export.export_hf([model], None, ranks, folder, folder / "hf")
    dist.destroy_process_group()
