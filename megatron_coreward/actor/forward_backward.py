"""One pass of packs through the model chunks, under Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_coreward.actor.microbatch import Pack

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _forward(packs: Iterator[Pack], model: Any) -> tuple[Pack, torch.Tensor]:
    pack = next(packs)
    return pack, model(pack.token_ids, pack.position_ids, None, packed_seq_params=pack.bounds)


def _run(chunks: list[Any], packs: list[Pack], step: Callable[..., Any], **kwargs: Any) -> list[Any]:
    iterators = [iter(packs) for _ in chunks]
    several = len(chunks) > 1
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=len(packs),
        seq_length=packs[0].num_tokens,
        micro_batch_size=1,
        **kwargs,
    )
    return outputs


def forward_only(chunks: list[Any], packs: list[Pack], score: Callable[[Pack, torch.Tensor], Any]) -> list[Any] | None:
    """Calls `score(pack, logits [T, V/tp])` for each pack on the last pipeline stage; None on the others."""

    def step(iterator: Iterator[Pack], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        pack, output = _forward(iterator, model)
        return output, lambda logits, non_loss_data: score(pack, logits[0])

    with torch.no_grad():
        outputs = _run(chunks, packs, step, forward_only=True, collect_non_loss_data=True)
    return outputs if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def forward_backward(
    chunks: list[Any], packs: list[Pack], loss: Callable[[Pack, torch.Tensor], Loss]
) -> list[dict[str, torch.Tensor]] | None:
    """Accumulates the gradient of the *sum* of `loss(pack, logits [T, V/tp])` over packs and data-parallel ranks.

    Returns:
        The second results of `loss`, pack by pack, on the last pipeline stage; None on the others.
    """

    def step(iterator: Iterator[Pack], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        pack, output = _forward(iterator, model)

        def loss_func(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, stats = loss(pack, logits[0])
            # The middle element is Megatron's token count, by which nothing is divided here.
            return value, torch.ones((), dtype=torch.int, device=logits.device), stats

        return output, loss_func

    outputs = _run(chunks, packs, step, forward_only=False)
    return outputs if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
