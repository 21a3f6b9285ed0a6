"""Hugging Face tensors in and out of the ranks' parameter shards, by the table of `weights.mapping`."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from megatron_coreward.actor.parallel import Coordinates
from megatron_coreward.checkpoint.safetensors_files import HfWeights
from megatron_coreward.checkpoint.torch_dist import MegatronWeights
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import RunError
from megatron_coreward.weights.mapping import Index, blocks, is_expert, is_replicated
from megatron_coreward.weights.send import HeldBlock

_LOCAL_EXPERT = re.compile(r"(\.local_experts\.|\.linear_fc[12]\.weight)(\d+)")


def global_parameters(
    chunks: list[GPTModel], arch: Architecture, at: Coordinates
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters under their names in the unsharded model (global layer and expert numbers)."""
    first_expert = 0 if arch.experts is None else arch.experts.num // at.ep_size * at.ep_rank
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


def _tensor_parallel(name: str, at: Coordinates) -> tuple[int, int]:
    return (at.expert_tp_rank, at.expert_tp_size) if is_expert(name) else (at.tp_rank, at.tp_size)


@torch.no_grad()
def load_hf(chunks: list[GPTModel], arch: Architecture, at: Coordinates, path: Path) -> None:
    """Fills this rank's shards from the safetensors files in `path`, reading only the slices it needs.

    Raises:
        InputError: files are missing or damaged, or a tensor is missing, left over or of another shape.
    """
    with ExitStack() as stack:
        weights = HfWeights(path)
        weights.check(arch)
        files = {t.file: stack.enter_context(safe_open(t.file, framework="pt")) for t in weights.tensors.values()}
        for name, param in global_parameters(chunks, arch, at):
            param.zero_()  # rows that pad the vocabulary
            for block in blocks(name, arch, *_tensor_parallel(name, at)):
                stored = files[weights.tensors[block.hf_name].file].get_slice(block.hf_name)
                param[block.shard_index].copy_(stored[block.hf_index])


@torch.no_grad()
def load_megatron(chunks: list[GPTModel], arch: Architecture, path: Path) -> None:
    """Fills this rank's shards from a Megatron distributed checkpoint of any layout, through Megatron's own reader.

    Raises:
        InputError: no such checkpoint, or not one of this architecture.
    """
    MegatronWeights(path, arch).close()  # checks it, and that its metadata is harmless to unpickle
    for chunk in chunks:
        for param in chunk.parameters():
            param.zero_()  # rows that pad the vocabulary
        # Transformer Engine's FP8 scaling state is not part of a model's weights; a checkpoint may lack it.
        wanted = {k: v for k, v in chunk.sharded_state_dict().items() if not isinstance(v, ShardedObject)}
        loaded = dist_checkpointing.load(wanted, str(path))
        problems = chunk.load_state_dict(loaded, strict=False)
        missing = [name for name in problems.missing_keys if not name.endswith("_extra_state")]
        if missing or problems.unexpected_keys:
            raise RunError(f"{path}: Megatron did not load {(missing or problems.unexpected_keys)[0]!r}")


def owned_blocks(chunks: list[GPTModel], arch: Architecture, at: Coordinates) -> list[HeldBlock]:
    """What this rank hands out; over all ranks, every element of every HF tensor exactly once.

    Copies of a shard (data-parallel replicas; for norms, tensor-parallel ranks too) take turns, parameter by parameter.
    """
    owned = []
    for turn, (name, param) in enumerate(global_parameters(chunks, arch, at)):
        if name == "output_layer.weight" and arch.tied:
            continue  # the copy of the embedding that the last pipeline stage keeps
        tp_rank, tp_size = _tensor_parallel(name, at)
        replica, replicas = (at.expert_dp_rank, at.expert_dp_size) if is_expert(name) else (at.dp_rank, at.dp_size)
        if is_replicated(name):
            replica, replicas = replica * tp_size + tp_rank, replicas * tp_size
        if turn % replicas != replica:
            continue
        for block in blocks(name, arch, tp_rank, tp_size):
            owned.append(HeldBlock(block.hf_name, block.hf_index, _reader(param, block.shard_index)))
    return owned


def _reader(param: torch.nn.Parameter, index: Index) -> Callable[[], torch.Tensor]:
    return lambda: param.detach()[index]
