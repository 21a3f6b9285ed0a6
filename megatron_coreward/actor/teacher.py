"""The EMA teacher (Co-rewarding-II, arXiv 2508.00410, section 4.2) and frozen copies of the policy's model.

    teacher <- d * teacher + (1 - d) * policy

At 1 - d = 1e-4 a BF16 teacher does not move and a plain fp32 one loses a third of its movement to rounding, so the
teacher is kept as fp32 value plus fp32 compensation (Kahan), cut over ranks just like the optimizer's main parameters.

Bytes per parameter: 8 for value and compensation, divided by the data-parallel size; plus, for the copy that answers
and is published, 2 (BF16) or 4 (fp32) on every data-parallel rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer


@dataclass(frozen=True, slots=True)
class MainShard:
    """The part of a parameter whose fp32 main copy this data-parallel rank owns: flat elements [start, stop)."""

    param: torch.nn.Parameter
    start: int
    stop: int
    value: torch.Tensor  # [stop - start] fp32, the optimizer's own tensor


def main_shards(optimizer: MegatronOptimizer) -> Iterator[MainShard]:
    """The optimizer's main parameters on this rank. In fp32 runs they are views of the model's parameters."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for params, shards in (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        ):
            for group, shard_group in zip(params, shards, strict=True):
                for param, shard in zip(group, shard_group, strict=True):
                    owned = part._get_model_param_range_map(param)["param"]
                    yield MainShard(param, owned.start, owned.end, shard)


class FlatWeights:
    """One more set of values for the policy's parameters: flat buffers of the policy's geometry, in any dtype.

    Data-parallel ranks fill it with the shards they own and gather the rest.
    """

    def __init__(self, policy: list[DistributedDataParallel], dtype: torch.dtype | None = None) -> None:
        """Zeros; of the policy's dtype unless another is given."""
        self._flats: list[tuple[Any, torch.Tensor]] = []  # (policy buffer, our flat tensor of the same geometry)
        self._place: dict[torch.nn.Parameter, tuple[torch.Tensor, int]] = {}
        for wrapped in policy:
            for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
                flat = torch.zeros_like(buffer.param_data, dtype=dtype or buffer.param_data.dtype)
                self._flats.append((buffer, flat))
                for param in buffer.params:
                    self._place[param] = (flat, buffer.param_index_map[param][0])

    def of(self, param: torch.nn.Parameter) -> torch.Tensor:
        """The values for a parameter of the policy, as a view in its shape."""
        flat, offset = self._place[param]
        return flat[offset : offset + param.numel()].view(param.shape)

    @torch.no_grad()
    def copy_policy(self) -> None:
        """Takes the policy's present weights."""
        for buffer, flat in self._flats:
            flat.copy_(buffer.param_data)

    @torch.no_grad()
    def fill(self, shards: Iterable[tuple[MainShard, torch.Tensor]]) -> None:
        """Takes the given values for the shards that this rank owns, and every other rank's for the rest."""
        for shard, value in shards:
            self.of(shard.param).view(-1)[shard.start : shard.stop].copy_(value)
        for buffer, flat in self._flats:
            size, rank = buffer.data_parallel_world_size, buffer.data_parallel_group.rank()
            if size == 1:
                continue
            for bucket in buffer.buckets:
                whole = flat[bucket.offset : bucket.offset + bucket.param_data.numel()]
                own = whole.view(size, -1)[rank].clone()
                dist.all_gather_into_tensor(whole, own, group=buffer.data_parallel_group)


class FrozenModel:
    """A second model under the policy's layout, to be run and published: no gradients, no optimizer."""

    def __init__(self, chunks: list[GPTModel], policy: list[DistributedDataParallel]) -> None:
        self.chunks = chunks
        self.weights = FlatWeights(policy)
        for chunk, wrapped in zip(chunks, policy, strict=True):
            ours = dict(chunk.named_parameters())
            for name, param in wrapped.module.named_parameters():
                ours[name].data = self.weights.of(param)
            chunk.requires_grad_(False)
            chunk.eval()


class EmaTeacher:
    """Exponential moving average of the policy's main parameters, in compensated fp32, cut like them."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        """Starts as the policy's present weights."""
        self._optimizer = optimizer
        self.values = [shard.value.detach().clone() for shard in main_shards(optimizer)]
        self.compensations = [torch.zeros_like(value) for value in self.values]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One step towards the policy's present weights."""
        for shard, value, compensation in self._each():
            ema_step_(value, compensation, shard.value, decay)

    def write_to(self, model: FrozenModel) -> None:
        """Puts the teacher's present weights into a model, in that model's dtype."""
        model.weights.fill((shard, value) for shard, value, _ in self._each())

    def whole(self, policy: list[DistributedDataParallel]) -> tuple[FlatWeights, FlatWeights]:
        """Value and compensation gathered from all data-parallel ranks, fp32 (for checkpoints)."""
        value, compensation = FlatWeights(policy, torch.float32), FlatWeights(policy, torch.float32)
        value.fill((shard, v) for shard, v, _ in self._each())
        compensation.fill((shard, c) for shard, _, c in self._each())
        return value, compensation

    @torch.no_grad()
    def take(self, value: FlatWeights, compensation: FlatWeights) -> None:
        """The inverse of `whole`."""
        for shard, own_value, own_compensation in self._each():
            own_value.copy_(value.of(shard.param).view(-1)[shard.start : shard.stop])
            own_compensation.copy_(compensation.of(shard.param).view(-1)[shard.start : shard.stop])

    def _each(self) -> Iterator[tuple[MainShard, torch.Tensor, torch.Tensor]]:
        return zip(main_shards(self._optimizer), self.values, self.compensations, strict=True)


def ema_step_(value: torch.Tensor, compensation: torch.Tensor, target: torch.Tensor, decay: float) -> None:
    """`value + compensation <- decay * (value + compensation) + (1 - decay) * target`, in place.

    `compensation` holds what rounding cut off `value`, so movements far below its last bit add up.
    """
    movement = torch.sub(target, value).sub_(compensation).mul_(1.0 - decay).add_(compensation)
    moved = value + movement
    torch.sub(movement, moved - value, out=compensation)
    value.copy_(moved)
