"""The EMA teacher (Co-rewarding-II, arXiv 2508.00410, section 4.2) and frozen copies of the policy's model.

    teacher <- d * teacher + (1 - d) * policy

At 1 - d = 1e-4 a BF16 teacher does not move and a plain fp32 one loses a third of its movement to rounding, so the
teacher is kept as fp32 value plus fp32 compensation (Kahan), cut over ranks just like the optimizer's main parameters.

Bytes per parameter: 8 for value and compensation, divided by the data-parallel size; plus, for the copy that answers
and is sent to the engines, 2 (BF16) or 4 (fp32) on every data-parallel rank.
"""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer

from megatron_coreward.actor.shards import FlatWeights, MainShard, main_shards

GROUP_ELEMENTS = 1 << 25  # of main parameters that the EMA steps together, if there is more than one tensor


class FrozenModel:
    """A second model under the policy's layout, to be run and sent to the engines: no gradients, no optimizer."""

    def __init__(self, chunks: list[GPTModel], policy: list[DistributedDataParallel]) -> None:
        self.chunks = chunks
        self.weights = FlatWeights(policy)
        for chunk, wrapped in zip(chunks, policy, strict=True):
            ours = dict(chunk.named_parameters())
            for name, param in wrapped.module.named_parameters():
                ours[name].data = self.weights.of(param)
            chunk.requires_grad_(False)
            chunk.eval()

    def start_as_policy(self, optimizer: MegatronOptimizer) -> None:
        """Takes the policy's weights as the optimizer has them: those of a policy in FP8 are rounded."""
        self.weights.fill((shard, shard.value) for shard in main_shards(optimizer))


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
        shards = [shard.value for shard in main_shards(self._optimizer)]
        for first, stop in _groups(shards):
            ema_step_(self.values[first:stop], self.compensations[first:stop], shards[first:stop], decay)

    def write_to(self, model: FrozenModel) -> None:
        """Puts the teacher's present weights into a model, in that model's dtype."""
        model.weights.fill((shard, value) for shard, value, _ in self._each())

    def _each(self) -> Iterator[tuple[MainShard, torch.Tensor, torch.Tensor]]:
        return zip(main_shards(self._optimizer), self.values, self.compensations, strict=True)


def _groups(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """First and last-plus-one of tensors that are stepped together: few kernels for many small ones, and no more
    temporary memory than one large one takes."""
    first, held = 0, 0
    for place, tensor in enumerate(tensors):
        if place > first and held + tensor.numel() > GROUP_ELEMENTS:
            yield first, place
            first, held = place, 0
        held += tensor.numel()
    if tensors:
        yield first, len(tensors)


def ema_step_(
    values: list[torch.Tensor], compensations: list[torch.Tensor], targets: list[torch.Tensor], decay: float
) -> None:
    """`value + compensation <- decay * (value + compensation) + (1 - decay) * target`, in place, for each of the
    tensors.

    `compensation` holds what rounding cut off `value`, so movements far below its last bit add up.
    """
    movement = torch._foreach_sub(targets, values)
    torch._foreach_sub_(movement, compensations)
    torch._foreach_mul_(movement, 1.0 - decay)
    torch._foreach_add_(movement, compensations)
    moved = torch._foreach_add(values, movement)
    torch._foreach_sub_(movement, torch._foreach_sub(moved, values))
    torch._foreach_copy_(compensations, movement)
    torch._foreach_copy_(values, moved)
