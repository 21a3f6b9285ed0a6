"""The tensors of one micro-batch: sequences laid end to end in a pack of fixed size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_coreward.types import Sequences


@dataclass(frozen=True, slots=True)
class Pack:
    """The tensors of one micro-batch: T tokens, of which N are response tokens to score."""

    rows: tuple[int, ...]  # sequences of the batch, in the order in which they lie in the pack
    token_ids: torch.Tensor  # [1, T]
    position_ids: torch.Tensor  # [1, T], restarting at each sequence
    bounds: PackedSeqParams  # where sequences begin and end
    predicts: torch.Tensor  # [N] where the logits that predict a response token stand
    targets: torch.Tensor  # [N] the response tokens
    row_of: torch.Tensor  # [N] index into `rows`
    response_lengths: tuple[int, ...]  # of each row; sums to N


def build_pack(sequences: Sequences, rows: Sequence[int], num_tokens: int, device: torch.device) -> Pack:
    """Lays the given sequences end to end and pads to `num_tokens` with a last sequence of token 0 that nobody scores.

    Args:
        rows: which of the sequences.
        num_tokens: T; at least the sum of their lengths.
    """
    tokens = np.zeros(num_tokens, dtype=np.int64)
    positions = np.zeros(num_tokens, dtype=np.int64)
    ends, predicts, row_of, lengths = [0], [], [], []
    for place, row in enumerate(rows):
        sequence, prompt = sequences.token_ids[row], int(sequences.prompt_lengths[row])
        start, stop = ends[-1], ends[-1] + len(sequence)
        tokens[start:stop] = sequence
        positions[start:stop] = np.arange(len(sequence))
        predicts.append(np.arange(start + prompt - 1, stop - 1))
        row_of.append(np.full(len(sequence) - prompt, place))
        lengths.append(len(sequence) - prompt)
        ends.append(stop)
    if ends[-1] < num_tokens:
        positions[ends[-1] :] = np.arange(num_tokens - ends[-1])
        ends.append(num_tokens)
    where = np.concatenate(predicts) if predicts else np.zeros(0, dtype=np.int64)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device)
    longest = int(np.diff(ends).max())
    return Pack(
        rows=tuple(rows),
        token_ids=torch.from_numpy(tokens)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        bounds=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        predicts=torch.from_numpy(where).to(device),
        targets=torch.from_numpy(tokens[where + 1]).to(device),
        row_of=torch.from_numpy(np.concatenate(row_of) if row_of else np.zeros(0, dtype=np.int64)).to(device),
        response_lengths=tuple(lengths),
    )
