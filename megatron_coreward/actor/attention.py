"""Core attention of the local layer spec over packed sequences, through torch's scaled-dot-product kernel.

Megatron's own local attention takes one padded batch and a dense mask; Transformer Engine's takes packed sequences but
needs a GPU. This one takes the same `PackedSeqParams` as Transformer Engine's, so actors run one code path everywhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_coreward.actor.packing import ContextRank, local_tokens


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack: no token sees another sequence.

    The sequences of the pack are unfolded into rows of the longest one's length and run as one causal batch; right
    padding needs no mask under causality. Query heads share key/value heads as in grouped-query attention.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale  # None: 1 / sqrt(head_dim)

    def forward(
        self,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, kv_heads, D]
        value: torch.Tensor,  # [T, kv_heads, D]
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:  # [T, heads * D]
        cu_seqlens = packed_seq_params.cu_seqlens_q  # [N + 1]
        if self.config.context_parallel_size > 1:
            return self._over_ranks(query, key, value, cu_seqlens)
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        rows, longest = len(lengths), packed_seq_params.max_seqlen_q
        device = query.device
        tokens = torch.arange(query.shape[0], device=device)
        row = torch.repeat_interleave(torch.arange(rows, device=device), lengths, output_size=query.shape[0])
        slot = row * longest + tokens - cu_seqlens[row]  # [T] place of each token in the unfolded [N * longest]

        def unfold(x: torch.Tensor) -> torch.Tensor:  # [T, h, D] -> [N, h, longest, D]
            flat = x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, slot, x)
            return flat.view(rows, longest, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            unfold(query),
            unfold(key),
            unfold(value),
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        folded = out.transpose(1, 2).reshape(rows * longest, -1)
        return folded.index_select(0, slot)

    def _over_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """The same if each context-parallel rank has a part of every sequence: keys and values of all ranks are
        gathered, and all pairs of a pack's tokens are masked. Transformer Engine passes keys and values in a ring."""
        group = parallel_state.get_context_parallel_group()
        bounds, size, rank = cu_seqlens.tolist(), group.size(), group.rank()
        held = [torch.from_numpy(local_tokens(bounds, ContextRank(r, size))).to(query.device) for r in range(size)]
        order = torch.cat(held).argsort()
        key, value = (gather_from_sequence_parallel_region(x, group=group)[order] for x in (key, value))
        tokens = torch.arange(len(order), device=query.device)
        sequence = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)  # [T]
        mine = held[rank]
        visible = (sequence[mine, None] == sequence[None]) & (mine[:, None] >= tokens[None])
        heads_first = [x.transpose(0, 1)[None] for x in (query, key, value)]  # [1, heads, tokens, D]
        out = F.scaled_dot_product_attention(
            heads_first[0],
            heads_first[1],
            heads_first[2],
            attn_mask=visible,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1).reshape(len(mine), -1)
