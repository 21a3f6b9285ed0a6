"""Log-probability, entropy and self-certainty of tokens, from hidden states and an output layer that is cut over
tensor-parallel ranks. The logits of a pack never exist as a whole, neither forwards nor backwards.

With z = h W^T / temperature the logits over a vocabulary of V tokens, p = softmax(z) and lse = log sum exp(z):

    logprob(t)      = z_t - lse
    entropy         = lse - sum_j p_j z_j
    self_certainty  = KL(uniform || p) = lse - mean_j z_j - log V

Rows are taken in chunks: a chunk's logits are computed into one buffer, reduced to a few numbers a row, and forgotten.
The backward pass computes them again, turns them in place into p - onehot(t), rounded once, and multiplies twice: the
gradient of the hidden states, and that of the weight, which is added to Megatron's `main_grad` if there is one. With a
gradient of the entropy, whose own is -p (log p + entropy), the two are weighed and added before they are rounded. Each
rank reduces its own columns against its own maximum; two all-reduces for all rows together then bring the ranks' sums
to one maximum.

Invariants (tests/actor/test_token_stats.py, benchmarks/bench_loss.py):
  1. The results are the definitions above, and the gradient is that of log_softmax, to rounding in fp32.
  2. Beside gradients, memory is at most 1.5 times the fp32 logits of one chunk, which is 6 bytes a logit.
  3. Rows that are not scored never meet the output layer, and no statistic is computed that was not asked for.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Logits of one chunk, and of one block of rows that is reduced at a time. On CPU a block stays in the processor's
# cache, so that the logits are read from memory once; on GPU compiled kernels read them twice, whatever the block.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 28}
WEIGHT_SLICE_ELEMENTS = 1 << 26  # of a weight gradient in less than fp32, before it is added to the fp32 one
LEAST = -1e30  # the maximum over no columns at all; finite, so that nothing becomes NaN


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
    """Of N response tokens; `logprobs` carries a gradient, and `entropy` if it was asked for. Entropy and
    self-certainty are empty if they were not asked for."""

    logprobs: torch.Tensor  # [N] fp32
    entropy: torch.Tensor  # [N] or [0] fp32, nats
    self_certainty: torch.Tensor  # [N] or [0] fp32, nats


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabularyShard,
    temperature: float,
    statistics: bool = True,
    entropy_gradient: bool = False,
) -> Scores:
    """Scores the tokens `targets` under the distributions that the hidden states give.

    Args:
        hidden: [N, H] the states that predict the targets, the same on all tensor-parallel ranks. Their gradient is
            this rank's part of a sum over those ranks.
        weight: [W, H] this rank's rows of the output layer, padding of the vocabulary included (it is left out of all
            sums, and its gradient is zero).
        targets: [N] token ids over the whole vocabulary.
        temperature: the sampling temperature; all three statistics are of the distribution that was sampled from.
        statistics: whether entropy and self-certainty are wanted beside the log-probs.
        entropy_gradient: whether the entropy is differentiable; it then has to be wanted.
    """
    arguments = (hidden, weight, targets, shard, 1.0 / temperature, statistics, entropy_gradient)
    scores = _Score.apply(*arguments)  # type: ignore[no-untyped-call]
    return Scores(*scores)


def _reduce_rows(z: torch.Tensor, scale: float, statistics: bool) -> tuple[torch.Tensor, ...]:
    """Of logits [r, W]: the maximum m of scale * z, sum exp(x), and if wanted sum exp(x) x and sum x, each [r], with
    x = scale * z - m."""
    x = z.float() if scale == 1.0 else z.float() * scale
    top = x.amax(dim=-1)
    x = x - top[:, None]
    e = x.exp()
    sums = (top, e.sum(dim=-1))
    return (*sums, (e * x).sum(dim=-1), x.sum(dim=-1)) if statistics else sums


def _softmax_rows_(z: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
    """z <- exp(scale * z - lse) [r, W], computed in fp32."""
    x = z.float()
    if scale != 1.0:
        x.mul_(scale)
    x.sub_(lse[:, None]).exp_()
    if z.dtype != torch.float32:  # else they are one
        z.copy_(x)


def _mixed_rows_(
    z: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    of_logprob: torch.Tensor,
    of_entropy: torch.Tensor,
    entropy: torch.Tensor,
) -> None:
    """z <- p (of_logprob + of_entropy (log p + entropy)) [r, W], computed in fp32; the factors are [r]."""
    x = z.float()
    if scale != 1.0:
        x = x * scale
    x = x - lse[:, None]
    z.copy_(x.exp() * (of_logprob[:, None] + of_entropy[:, None] * (x + entropy[:, None])))


@functools.cache
def _kernel(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function as it runs on a kind of device: one fused kernel on GPU, plain operations on CPU."""
    return function if device == "cpu" else torch.compile(function, dynamic=True)


def _pieces(num_rows: int, width: int, elements: int) -> Iterator[slice]:
    """Rows in pieces of this many elements, a row at least."""
    step = max(1, elements // max(1, width))
    return (slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step))


def _local_targets(targets: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target on this rank, and whether it is here at all."""
    here = (targets >= shard.start) & (targets < shard.stop)
    return torch.where(here, targets - shard.start, 0), here


def _logits_of_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, shard: VocabularyShard
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a chunk with their logits [n, W] without padding, all in one buffer that the next chunk overwrites."""
    weight = weight[: shard.width]
    buffer: torch.Tensor | None = None
    for chunk in _pieces(len(hidden), shard.width, CHUNK_ELEMENTS[hidden.device.type]):
        rows = hidden[chunk]
        if buffer is None:
            buffer = rows.new_empty(len(rows), shard.width)
        yield chunk, torch.mm(rows, weight.t(), out=buffer[: len(rows)])


def _row_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    shard: VocabularyShard,
    scale: float,
    statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over this rank's columns: the maximum m of each row [N], and [k, N] sums of it, with x = z - m: sum exp(x), x of
    the target if it is here, and if wanted sum exp(x) x and sum x."""
    device = hidden.device
    sums = torch.zeros(4 if statistics else 2, len(hidden), dtype=torch.float32, device=device)
    top = torch.full((len(hidden),), LEAST, dtype=torch.float32, device=device)
    if shard.width == 0:  # a rank may hold nothing but padding of the vocabulary
        return top, sums
    column, here = _local_targets(targets, shard)
    reduce_rows = _kernel(_reduce_rows, device.type)
    for chunk, z in _logits_of_chunks(hidden, weight, shard):
        for piece in _pieces(len(z), shard.width, BLOCK_ELEMENTS[device.type]):
            rows = slice(chunk.start + piece.start, chunk.start + piece.stop)
            top[rows], sums[0, rows], *more = reduce_rows(z[piece], scale, statistics)
            for place, values in enumerate(more):
                sums[2 + place, rows] = values
        sums[1, chunk] = z.gather(1, column[chunk, None])[:, 0].float() * scale
    sums[1] = torch.where(here, sums[1] - top, 0.0)
    return top, sums


def _over_ranks(
    top: torch.Tensor, sums: torch.Tensor, targets: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over the whole vocabulary: every rank's sums are moved to the common maximum and added."""
    common = top.clone()
    dist.all_reduce(common, op=dist.ReduceOp.MAX, group=shard.group)
    shift = top - common
    if len(sums) > 2:
        sums[2] += shift * sums[0]
        sums[2] *= shift.exp()
        sums[3] += shift * shard.width
    sums[0] *= shift.exp()
    sums[1] += torch.where(_local_targets(targets, shard)[1], shift, 0.0)
    dist.all_reduce(sums, group=shard.group)
    return common, sums


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        shard: VocabularyShard,
        scale: float,
        statistics: bool,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        top, sums = _row_sums(hidden, weight, targets, shard, scale, statistics)
        if shard.group is not None:
            top, sums = _over_ranks(top, sums, targets, shard)
        log_sum = sums[0].log()
        logprobs = sums[1] - log_sum
        entropy, certainty = logprobs.new_empty(0), logprobs.new_empty(0)
        if statistics:
            entropy = log_sum - sums[2] / sums[0]
            certainty = log_sum - sums[3] / shard.size - math.log(shard.size)
        ctx.save_for_backward(hidden, weight, targets, top + log_sum, logprobs, entropy)
        ctx.shard, ctx.scale, ctx.entropy_gradient = shard, scale, entropy_gradient
        ctx.main_grad = getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(*((certainty,) if entropy_gradient else (entropy, certainty)))
        return logprobs, entropy, certainty

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, lse, logprobs, entropy = ctx.saved_tensors
        shard, scale = ctx.shard, ctx.scale
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight, added = None, ctx.main_grad
        if wants_weight and added is None:
            grad_weight = added = torch.zeros_like(weight)
        column, here = _local_targets(targets, shard)
        both = ctx.entropy_gradient
        # [N, 1]: dloss/dz is this times (p - onehot), so it goes to the short side
        factor = torch.full_like(grad, -scale)[:, None] if both else (-scale * grad)[:, None]
        softmax_rows_, mixed_rows_ = (_kernel(f, hidden.device.type) for f in (_softmax_rows_, _mixed_rows_))
        for chunk, z in _logits_of_chunks(hidden, weight, shard) if shard.width else ():
            for piece in _pieces(len(z), shard.width, BLOCK_ELEMENTS[z.device.type]):
                rows = slice(chunk.start + piece.start, chunk.start + piece.stop)
                if both:
                    mixed_rows_(z[piece], lse[rows], scale, grad[rows], grad_entropy[rows], entropy[rows])
                else:
                    softmax_rows_(z[piece], lse[rows], scale)
            # p - 1 of the target from its log-prob: BF16 next to 1 is so coarse that it would be 0 from p = 0.998 on.
            others = z.gather(1, column[chunk, None])[:, 0].float()
            of_target = logprobs[chunk].expm1()
            if both:
                surprise = logprobs[chunk].exp() * (logprobs[chunk] + entropy[chunk])
                of_target = grad[chunk] * of_target + grad_entropy[chunk] * surprise
            ours = torch.where(here[chunk], of_target, others)
            z.scatter_(1, column[chunk, None], ours[:, None].to(z.dtype))
            if grad_hidden is not None:
                torch.mm(z, weight[: shard.width], out=grad_hidden[chunk])
                grad_hidden[chunk] *= factor[chunk]
            if added is not None:
                rows_of_weight = (hidden[chunk] * factor[chunk]).to(z.dtype)
                _add_product(added[: shard.width], z, rows_of_weight)
        return grad_hidden, grad_weight, None, None, None, None, None


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target [W, H] += left [n, W]^T right [n, H]; slice by slice if the product has to be made in another dtype."""
    if target.dtype == left.dtype:
        target.addmm_(left.t(), right)
        return
    for rows in _pieces(len(target), target.shape[1], WEIGHT_SLICE_ELEMENTS):
        target[rows] += left[:, rows].t() @ right
