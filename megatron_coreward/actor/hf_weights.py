"""Hugging Face tensors in and out of the ranks' parameter shards, by the table of `weights.mapping`."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import SafetensorError, safe_open

from megatron_coreward.actor.parallel import Coordinates
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.mapping import Index, blocks, hf_tensors, is_expert, is_replicated
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
        tensors = _open_tensors(path, stack)
        _check_tensors(tensors, arch, path)
        for name, param in global_parameters(chunks, arch, at):
            param.zero_()  # rows that pad the vocabulary
            for block in blocks(name, arch, *_tensor_parallel(name, at)):
                param[block.shard_index].copy_(tensors[block.hf_name][block.hf_index])


def _open_tensors(path: Path, stack: ExitStack) -> dict[str, Any]:
    """HF name -> lazy slice of the file that holds it."""
    files = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not files:
        raise InputError(f"model.hf_path: no *.safetensors files in {path}")
    tensors: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{index} names {file.name}, which does not exist")
        try:
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a readable safetensors file ({e})") from None
        tensors.update({name: handle.get_slice(name) for name in handle.keys()})  # noqa: SIM118 (not a dict)
    return tensors


def _check_tensors(tensors: dict[str, Any], arch: Architecture, path: Path) -> None:
    expected = hf_tensors(arch)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise InputError(f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}")
    tolerated = {"lm_head.weight"} if arch.tied else set()
    extra = [n for n in tensors if n not in expected and n not in tolerated and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise InputError(f"{path}: {len(extra)} tensors have no place in a {arch.family} model, first {extra[0]!r}")
    for name, shape in expected.items():
        if tuple(tensors[name].get_shape()) != shape:
            found = tuple(tensors[name].get_shape())
            raise InputError(f"{path}: tensor {name!r} has shape {found}, config.json asks for {shape}")


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
