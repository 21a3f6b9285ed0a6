"""The tensors of one micro-batch: sequences laid end to end in a pack of fixed size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from megatron_coreward.actor.packing import ContextRank, local_tokens
from megatron_coreward.types import Sequences


@dataclass(frozen=True, slots=True)
class Pack:
    """The tensors of one micro-batch: T tokens, of which N are response tokens to score.

    Under context parallelism a rank has T / C of the tokens and scores n of the N.
    """

    rows: tuple[int, ...]  # sequences of the batch, in the order in which they lie in the pack
    num_tokens: int  # T
    token_ids: torch.Tensor  # [1, T / C]
    position_ids: torch.Tensor  # [1, T / C], restarting at each sequence
    bounds: PackedSeqParams  # where sequences begin and end, in the pack as a whole
    predicts: torch.Tensor  # [n] where the logits that predict a response token stand
    targets: torch.Tensor  # [n] the response tokens
    row_of: torch.Tensor  # [n] index into `rows`
    scored: torch.Tensor | None  # [n] which of the N these are; None: all
    response_lengths: tuple[int, ...]  # of each row; sums to N
    experts: dict[int, torch.Tensor]  # of layers whose routing is replayed: [T / C, top k], -1: the router's own choice


def build_pack(
    sequences: Sequences,
    rows: Sequence[int],
    num_tokens: int,
    device: torch.device,
    context: ContextRank = ContextRank(),  # noqa: B008 (frozen)
    replayed: Sequence[int] = (),
) -> Pack:
    """Lays the given sequences end to end and pads to `num_tokens` with a last sequence of token 0 that nobody scores.

    Args:
        rows: which of the sequences.
        num_tokens: T; at least the sum of their lengths, each padded to the context's multiple.
        replayed: layers whose experts are wanted, if the sequences have them.
    """
    tokens, positions, ends = _lay_out(sequences, rows, num_tokens, context.multiple)
    predicts, row_of, lengths = [], [], []
    for place, (start, row) in enumerate(zip(ends, rows, strict=False)):
        prompt, length = int(sequences.prompt_lengths[row]), len(sequences.token_ids[row])
        predicts.append(np.arange(start + prompt - 1, start + length - 1))
        row_of.append(np.full(length - prompt, place))
        lengths.append(length - prompt)
    where = np.concatenate(predicts) if predicts else np.zeros(0, dtype=np.int64)
    row_of_each = np.concatenate(row_of) if row_of else np.zeros(0, dtype=np.int64)
    targets, scored = tokens[where + 1], None
    experts = _experts(sequences, rows, ends, num_tokens, replayed)
    if context.size > 1:
        own = local_tokens(ends, context)
        slot_of = np.full(num_tokens, -1, dtype=np.int64)
        slot_of[own] = np.arange(len(own))
        here = np.flatnonzero(slot_of[where] >= 0)
        tokens, positions, where = tokens[own], positions[own], slot_of[where[here]]
        experts = {layer: of_layer[own] for layer, of_layer in experts.items()}
        targets, row_of_each, scored = targets[here], row_of_each[here], torch.from_numpy(here).to(device)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device)
    longest = int(np.diff(ends).max())
    return Pack(
        rows=tuple(rows),
        num_tokens=num_tokens,
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
        targets=torch.from_numpy(targets).to(device),
        row_of=torch.from_numpy(row_of_each).to(device),
        scored=scored,
        response_lengths=tuple(lengths),
        experts={layer: torch.from_numpy(of_layer).to(device) for layer, of_layer in experts.items()},
    )


def _lay_out(
    sequences: Sequences, rows: Sequence[int], num_tokens: int, multiple: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Tokens and positions [T] of a pack, and where its sequences begin, each padded to a multiple, and where it ends:
    padding is a last sequence."""
    tokens = np.zeros(num_tokens, dtype=np.int64)
    positions = np.zeros(num_tokens, dtype=np.int64)
    ends = [0]
    for sequence in (sequences.token_ids[row] for row in rows):
        start, padded = ends[-1], -(-len(sequence) // multiple) * multiple
        tokens[start : start + len(sequence)] = sequence
        positions[start : start + padded] = np.arange(padded)
        ends.append(start + padded)
    if ends[-1] < num_tokens:
        positions[ends[-1] :] = np.arange(num_tokens - ends[-1])
        ends.append(num_tokens)
    return tokens, positions, ends


def _experts(
    sequences: Sequences, rows: Sequence[int], ends: Sequence[int], num_tokens: int, layers: Sequence[int]
) -> dict[int, NDArray[np.int16]]:
    """Layer by layer, the experts of every token of a pack whose sequences begin at `ends`. The last token of a
    sequence has none, since no engine reads it; neither has padding."""
    routed = sequences.routed_experts
    if routed is None or not layers or not rows:
        return {}
    found = {layer: np.full((num_tokens, routed[0].shape[2]), -1, dtype=np.int16) for layer in layers}
    for start, row in zip(ends, rows, strict=False):
        for layer, of_layer in found.items():
            of_layer[start : start + len(sequences.token_ids[row]) - 1] = routed[row][:, layer]
    return found
