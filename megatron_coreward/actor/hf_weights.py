"""Hugging Face tensors in and out of the ranks' parameter shards, by the table of `weights.mapping`."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel

from megatron_coreward.actor.parallel import ParallelRanks
from megatron_coreward.checkpoint.pieces import PIECE_BYTES, Scratch, WeightFiles, cuts
from megatron_coreward.checkpoint.safetensors_files import HfWeights
from megatron_coreward.checkpoint.torch_dist import MegatronWeights
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.buckets import block_bounds
from megatron_coreward.weights.mapping import Index, blocks, hf_tensors, is_expert, is_replicated
from megatron_coreward.weights.senders import LocalBlock

_LOCAL_EXPERT = re.compile(r"(\.local_experts\.|\.linear_fc[12]\.weight)(\d+)")


def global_parameters(
    chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their names in the unsharded model (global layer and expert numbers)."""
    first_expert = 0 if arch.experts is None else arch.experts.num // ranks.ep_size * ranks.ep_rank
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, param in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(numbers[int(parts[2])])
            name = ".".join(parts)
            if is_expert(name):
                name = _LOCAL_EXPERT.sub(lambda m: f"{m[1]}{int(m[2]) + first_expert}", name)
            yield name, param


def _tensor_parallel(name: str, ranks: ParallelRanks) -> tuple[int, int]:
    return (ranks.expert_tp_rank, ranks.expert_tp_size) if is_expert(name) else (ranks.tp_rank, ranks.tp_size)


def load_hf(chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks, path: Path) -> None:
    """Fills this rank's shards from the safetensors files in `path`, reading only the rows it needs.

    Raises:
        InputError: files are missing or damaged, or a tensor is missing, left over or of another shape.
    """
    with closing(HfWeights(path)) as weights:
        weights.check(arch)
        _load(chunks, arch, ranks, weights)


def load_megatron(
    chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks, path: Path, prefix: str = ""
) -> None:
    """Fills this rank's shards from a Megatron distributed checkpoint of any layout, reading only the rows it needs.

    (Megatron's own reader gives the same shards, which a test proves; it unpickles what it finds, and wants every key
    that its model has, the FP8 scaling state of Transformer Engine too.)

    Args:
        prefix: of the checkpoint's keys, `teacher.` for a run's teacher.

    Raises:
        InputError: no such checkpoint, or damaged, or not one of this architecture.
    """
    with closing(MegatronWeights(path, arch, prefix)) as weights:
        _load(chunks, arch, ranks, weights)


@torch.no_grad()
def _load(chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks, weights: WeightFiles) -> None:
    reader = ShardReader(arch, ranks, weights)
    for name, param in global_parameters(chunks, arch, ranks):
        quantised = is_float8tensor(param)
        whole = torch.empty(param.shape, dtype=param.dtype, device=param.device) if quantised else param
        reader.read(name, whole.shape, 0, whole.view(-1))
        if quantised:
            param.copy_(whole)
            # The optimizer starts from this copy. It was made when the module was, of memory without a meaning.
            param._high_precision_init_val = whole.cpu()  # type: ignore[attr-defined]


class ShardReader:
    """Reads this rank's shards of a checkpoint's tensors, or a part of one, in pieces of at most 16 MiB."""

    def __init__(self, arch: Architecture, ranks: ParallelRanks, weights: WeightFiles) -> None:
        self._arch, self._ranks, self._weights = arch, ranks, weights
        self._shapes, self._scratch = hf_tensors(arch), Scratch()

    @torch.no_grad()
    def read(self, name: str, shape: Sequence[int], start: int, out: torch.Tensor) -> None:
        """Fills `out` with elements of a parameter's shard, counted row by row, from `start` on.

        Args:
            name: with global layer and expert numbers.
            shape: of the shard on this rank.
            out: [n] of any dtype, on any device. What pads the vocabulary becomes zero.
        """
        stop = start + out.numel()
        columns = math.prod(shape[1:])
        first_row, last_row = start // columns, -(-stop // columns)
        out.zero_()
        for block in blocks(name, self._arch, *_tensor_parallel(name, self._ranks)):
            (row, end), *width = block_bounds("", shape, block.shard_index)
            (hf_row, _), *hf_width = block_bounds("", self._shapes[block.hf_name], block.hf_index)
            assert not width or width[0] == (0, columns)  # a block has whole rows of the shard
            low, high, dtype = max(row, first_row), min(end, last_row), self._weights.dtype(block.hf_name)
            for first, rows in cuts((max(0, high - low), columns), dtype.itemsize, PIECE_BYTES):
                piece = self._scratch.take((rows, columns) if width else (rows,), dtype)
                offset = hf_width[0][0] if hf_width else 0
                self._weights.read_rows(block.hf_name, hf_row + low - row + first, piece, offset)
                at = (low + first) * columns  # element of the shard at which the piece begins
                begin, finish = max(at, start), min(at + rows * columns, stop)
                out[begin - start : finish - start].copy_(piece.view(-1)[begin - at : finish - at])


def local_blocks(chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks) -> list[LocalBlock]:
    """Everything that this rank holds, copies that other ranks hold too included."""
    return [
        LocalBlock(block.hf_name, block.hf_index, _reader(param, block.shard_index))
        for name, param in global_parameters(chunks, arch, ranks)
        for block in blocks(name, arch, *_tensor_parallel(name, ranks))
    ]


def owned_blocks(chunks: list[GPTModel], arch: Architecture, ranks: ParallelRanks) -> list[LocalBlock]:
    """What this rank hands out; over all ranks, every element of every HF tensor exactly once.

    Copies of a shard (data-parallel replicas; for norms, tensor-parallel ranks too) alternate, parameter by parameter.
    """
    owned = []
    for number, (name, param) in enumerate(global_parameters(chunks, arch, ranks)):
        if name == "output_layer.weight" and arch.tied:
            continue  # the copy of the embedding that the last pipeline stage keeps
        tp_rank, tp_size = _tensor_parallel(name, ranks)
        replica, replicas = (
            (ranks.expert_dp_rank, ranks.expert_dp_size) if is_expert(name) else (ranks.copy_rank, ranks.num_copies)
        )
        if is_replicated(name):
            replica, replicas = replica * tp_size + tp_rank, replicas * tp_size
        if number % replicas != replica:
            continue
        for block in blocks(name, arch, tp_rank, tp_size):
            owned.append(LocalBlock(block.hf_name, block.hf_index, _reader(param, block.shard_index)))
    return owned


def _reader(param: torch.nn.Parameter, index: Index) -> Callable[[], torch.Tensor]:
    return lambda: full_precision(param)[index]


def full_precision(param: torch.Tensor) -> torch.Tensor:
    """The values that a parameter computes with; a copy if it is kept in FP8."""
    return dequantize_fp8_tensor(param) if is_float8tensor(param) else param.detach()
