"""Log-probability, entropy and self-certainty of tokens from logits that are cut over tensor-parallel ranks.

With z the logits over a vocabulary of V tokens, p = softmax(z / temperature) and lse = log sum exp(z / temperature):

    logprob(t)      = z_t - lse
    entropy         = lse - sum_j p_j z_j
    self_certainty  = KL(uniform || p) = lse - mean_j z_j - log V

The logits are never copied in fp32 as a whole: rows are taken in chunks, and the backward pass recomputes p from the
logits and lse.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CHUNK_ELEMENTS = 1 << 24  # fp32 logits held at once: 64 MiB


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The part of the vocabulary that this rank's logits are for: tokens [start, stop) of `size` in all."""

    start: int
    stop: int
    size: int
    group: dist.ProcessGroup | None  # tensor-parallel group; None: not cut

    @property
    def width(self) -> int:
        return max(0, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of N response tokens; only `logprobs` carries a gradient."""

    logprobs: torch.Tensor  # [N] fp32
    entropy: torch.Tensor  # [N] fp32, nats
    self_certainty: torch.Tensor  # [N] fp32, nats


def score_tokens(
    logits: torch.Tensor, predicts: torch.Tensor, targets: torch.Tensor, shard: VocabularyShard, temperature: float
) -> Scores:
    """Scores the tokens `targets` under the logits at the places `predicts`.

    Args:
        logits: [T, W] this rank's columns, padding of the vocabulary included (it is left out of all sums).
        predicts: [N] rows of `logits`.
        targets: [N] token ids over the whole vocabulary.
        temperature: the sampling temperature; all three statistics are of the distribution that was sampled from.
    """
    scores = _Score.apply(logits, predicts, targets, shard, temperature)  # type: ignore[no-untyped-call]
    return Scores(*scores)


def _chunks(predicts: torch.Tensor, width: int) -> list[slice]:
    """Of `width` columns, padding included: ranks reduce chunk by chunk, and only the padded width is that of all."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(i, min(i + step, len(predicts))) for i in range(0, len(predicts), step)]


def _local_targets(targets: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target on this rank, and whether it is here at all."""
    here = (targets >= shard.start) & (targets < shard.stop)
    return torch.where(here, targets - shard.start, 0), here


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        predicts: torch.Tensor,
        targets: torch.Tensor,
        shard: VocabularyShard,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = len(predicts)
        lse = torch.empty(n, dtype=torch.float32, device=logits.device)
        logprobs, entropy, certainty = torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse)
        for chunk in _chunks(predicts, logits.shape[1]):
            z = logits[predicts[chunk], : shard.width].float().div_(temperature)  # [n, W]
            # A rank may hold nothing but padding of the vocabulary.
            top = z.amax(dim=-1) if shard.width else torch.full((len(z),), -torch.inf, device=z.device)
            if shard.group is not None:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
            column, here = _local_targets(targets[chunk], shard)
            target = z.gather(1, column[:, None])[:, 0] if shard.width else torch.zeros_like(top)
            sums = torch.empty(4, len(z), dtype=torch.float32, device=z.device)
            sums[0] = torch.where(here, target, 0.0)
            sums[1] = z.sum(dim=-1)
            p = torch.exp(z - top[:, None])
            sums[2] = p.sum(dim=-1)
            sums[3] = p.mul_(z).sum(dim=-1)
            if shard.group is not None:
                dist.all_reduce(sums, group=shard.group)
            lse[chunk] = top + sums[2].log()
            logprobs[chunk] = sums[0] - lse[chunk]
            entropy[chunk] = lse[chunk] - sums[3] / sums[2]
            certainty[chunk] = lse[chunk] - sums[1] / shard.size - math.log(shard.size)
        ctx.save_for_backward(logits, predicts, targets, lse)
        ctx.shard, ctx.temperature = shard, temperature
        ctx.mark_non_differentiable(entropy, certainty)
        return logprobs, entropy, certainty

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        logits, predicts, targets, lse = ctx.saved_tensors
        shard, temperature = ctx.shard, ctx.temperature
        grad_logits = torch.zeros_like(logits)
        for chunk in _chunks(predicts, logits.shape[1]):
            rows = predicts[chunk]
            z = logits[rows, : shard.width].float().div_(temperature)
            g = torch.exp(z.sub_(lse[chunk, None])).mul_(-grad[chunk, None])  # [n, W]: -grad * p
            column, here = _local_targets(targets[chunk], shard)
            if shard.width:
                g.scatter_add_(1, column[:, None], torch.where(here, grad[chunk], 0.0)[:, None])
            grad_logits[rows, : shard.width] = g.div_(temperature).to(logits.dtype)
        return grad_logits, None, None, None, None
