"""Per-parameter quantities cut over data-parallel ranks as the distributed optimizer cuts its main parameters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_coreward.actor.optimizer import optimizer_parts

# Gathered at a time, over all ranks: what a gather takes beside the values themselves.
SLICE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True, slots=True)
class MainShard:
    """The part of a parameter whose fp32 main copy this data-parallel rank owns: flat elements [start, stop)."""

    param: torch.nn.Parameter
    start: int
    stop: int
    value: torch.Tensor  # [stop - start] fp32, the optimizer's own tensor
    state: dict[str, torch.Tensor]  # the optimizer's moments for it


def main_shards(optimizer: MegatronOptimizer) -> Iterator[MainShard]:
    """The optimizer's main parameters on this rank. In fp32 runs they are views of the model's parameters."""
    for part in optimizer_parts(optimizer):
        for params, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for group, shard_group in zip(params, shards, strict=True):
                for param, shard in zip(group, shard_group, strict=True):
                    owned = part._get_model_param_range_map(param)["param"]
                    yield MainShard(param, owned.start, owned.end, shard, part.optimizer.state[shard])


class FlatWeights:
    """One more set of values for the policy's parameters: flat buffers of the policy's geometry, in any dtype.

    Data-parallel ranks fill it with the shards they own and gather the rest.
    """

    def __init__(
        self, policy: list[DistributedDataParallel], dtype: torch.dtype | None = None, device: str | None = None
    ) -> None:
        """Zeros; of the policy's dtype and device unless others are given (if weights are FP8: of the dtype that it
        computes in)."""
        self._flats: list[tuple[Any, torch.Tensor]] = []  # (policy buffer, our flat tensor of the same geometry)
        self._place: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}
        for wrapped in policy:
            for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
                flat = torch.zeros_like(buffer.param_data, dtype=dtype or buffer.params[0].dtype, device=device)
                self._flats.append((buffer, flat))
                for param in buffer.params:
                    self._place[param] = (flat, buffer.param_index_map[param][0])

    def of(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The values for a parameter of the policy, as a view in its shape."""
        flat, offset = self._place[param]
        return flat[offset : offset + param.numel()].view(param.shape)

    @torch.no_grad()
    def fill(self, shards: Iterable[tuple[MainShard, torch.Tensor]]) -> None:
        """Takes the given values for the shards that this rank owns, and every other rank's for the rest."""
        for shard, value in shards:
            self.own(shard).copy_(value)
        for buffer, flat in self._flats:
            size, rank = buffer.data_parallel_world_size, buffer.data_parallel_group.rank()
            if size == 1:
                continue
            for bucket in buffer.buckets:
                whole = flat[bucket.offset : bucket.offset + bucket.param_data.numel()].view(size, -1)
                for part in torch.split(whole, max(1, SLICE_ELEMENTS[flat.device.type] // size), dim=1):
                    gathered = torch.empty_like(part, memory_format=torch.contiguous_format)
                    dist.all_gather_into_tensor(
                        gathered.view(-1), part[rank].contiguous(), group=buffer.data_parallel_group
                    )
                    part.copy_(gathered)

    @property
    def storages(self) -> list[torch.Tensor]:
        """The flat buffers, which all views share."""
        return [flat for _, flat in self._flats]

    def own(self, shard: MainShard) -> torch.Tensor:
        """The part of the values that this rank owns, as a view."""
        return self.of(shard.param).view(-1)[shard.start : shard.stop]
