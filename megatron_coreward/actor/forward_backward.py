"""One pass of packs through the model chunks, under Megatron's pipeline schedules."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_coreward.actor.microbatch import Pack

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _forward(packs: Iterator[Pack], model: Any, backward: bool) -> tuple[Pack, torch.Tensor]:
    pack = next(packs)
    for replay in _bare(model).replays:
        replay.begin(pack.experts.get(replay.layer), backward)
    return pack, model(pack.token_ids, pack.position_ids, None, packed_seq_params=pack.bounds)


def _bare(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _weight(model: Any) -> torch.Tensor:
    weight: torch.Tensor = _bare(model).output_weight
    return weight


def _scored_rows(hidden: torch.Tensor, pack: Pack, model: Any) -> torch.Tensor:
    """[n, H] of a stage's output [T, 1, H], whole on every tensor-parallel rank. Each of them scores its own part of
    the vocabulary, so backwards their gradients are summed."""
    rows: torch.Tensor
    if _bare(model).config.sequence_parallel:
        rows = gather_from_sequence_parallel_region(hidden[:, 0], tensor_parallel_output_grad=True)[pack.predicts]
    else:
        rows = copy_to_tensor_model_parallel_region(hidden[:, 0][pack.predicts])
    return rows


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


def forward_only(
    chunks: list[Any], packs: list[Pack], score: Callable[[Pack, torch.Tensor, torch.Tensor], Any]
) -> list[Any] | None:
    """Calls `score(pack, hidden [n, H], weight [V/tp, H])` for each pack on the last pipeline stage, with the hidden
    states that predict its scored tokens and the output layer's weight. None on the other stages."""

    def step(iterator: Iterator[Pack], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        pack, output = _forward(iterator, model, backward=False)
        return output, lambda hidden, non_loss_data: score(pack, _scored_rows(hidden, pack, model), _weight(model))

    with torch.no_grad():
        outputs = _run(chunks, packs, step, forward_only=True, collect_non_loss_data=True)
    return outputs if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def forward_backward(
    chunks: list[Any], packs: list[Pack], loss: Callable[[Pack, torch.Tensor, torch.Tensor], Loss]
) -> list[dict[str, torch.Tensor]] | None:
    """Accumulates the gradient of the *sum* of `loss` over packs and data-parallel ranks; its arguments are those that
    `forward_only` gives to `score`.

    Returns:
        The second results of `loss`, pack by pack, on the last pipeline stage; None on the others.
    """

    for model in chunks:
        for replay in _bare(model).replays:
            replay.forget()

    def step(iterator: Iterator[Pack], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        pack, output = _forward(iterator, model, backward=True)

        def loss_func(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            value, stats = loss(pack, _scored_rows(hidden, pack, model), _weight(model))
            # The middle element is Megatron's token count, by which nothing is divided here.
            return value, torch.ones((), dtype=torch.int, device=hidden.device), stats

        return output, loss_func

    outputs = _run(chunks, packs, step, forward_only=False)
    return outputs if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None
