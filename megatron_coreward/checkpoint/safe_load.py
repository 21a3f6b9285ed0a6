"""What in a Megatron checkpoint is more than tensors: refused if it could run code, else read without Megatron.

Megatron's own reader unpickles what it finds. `dist_checkpointing.load` takes `.metadata` with `pickle.load`, entries
that the metadata calls bytes with `torch.load(weights_only=False)`, the reader by the names in `metadata.json`, and
`common.pt` as `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` says. Transformer Engine unpickles its layers' extra state once more
by itself. So a resume does not call it, and looks at all of these with readers that run nothing; a checkpoint in which
one of them is not plainly data is refused.

What all ranks have in common (the schedule, the number of optimizer steps) lies in `common.pt` if megatron-core 0.16
wrote it, and as an object among the shards if 0.19 did. Both are read here under any version.

A checkpoint that is exchanged between the check and the load is not what this is about: who can write there while a run
loads it can write its code too.

Invariants (tests/checkpoint/test_safe_load.py):
  1. Nothing in the checkpoint is unpickled by anything but an allowlist, here or in what may be called afterwards.
  2. Every chunk lies in a file of the checkpoint's own directory, no link, within the file's bounds.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_coreward.checkpoint.torch_dist import read_metadata
from megatron_coreward.errors import InputError

_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_EXTRA_STATE = "_extra_state"
COMMON_FILE = "common.pt"
COMMON_STATE = "common_state/shard_0_1"  # the object's key in `.metadata`: the only one of one shard


def check_no_code(path: Path) -> None:
    """Makes sure that a distributed checkpoint can be read without running anything out of it.

    Args:
        path: the directory with `.metadata`, the `.distcp` files and, from megatron-core 0.16, `common.pt`.

    Raises:
        InputError: naming the file that would run code, or that is not what a checkpoint of this project has.
    """
    if os.environ.get(_UNSAFE, "0").lower() in ("1", "y", "yes", "true"):
        raise InputError(f"the environment variable {_UNSAFE} lets checkpoints run code; unset it")
    metadata = read_metadata(path)
    common = json.loads((path / "metadata.json").read_text()).get("common_backend", "torch")
    if common != "torch":
        raise InputError(f"{path / 'metadata.json'}: common_backend is {common!r}; supported: torch")
    _check_places(path, metadata)
    _common_state(path, metadata)
    for file in path.glob("*.pt"):
        if file.name != COMMON_FILE:
            raise InputError(f"{file}: no file of a checkpoint of this project; it would be unpickled")
    for index, where in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(entry, BytesStorageMetadata) and index.fqn != COMMON_STATE:
            _check_object(path / where.relative_path, index.fqn, _read(path, where))


def read_common_state(path: Path) -> dict[str, Any]:
    """What all ranks have in common, of a checkpoint that megatron-core 0.16 or 0.19 wrote.

    Raises:
        InputError: as `check_no_code`; or it is missing, or there twice.
    """
    metadata = read_metadata(path)
    _check_places(path, metadata)
    return _common_state(path, metadata)


def _common_state(path: Path, metadata: Metadata) -> dict[str, Any]:
    file = path / COMMON_FILE
    where = metadata.storage_data.get(MetadataIndex(COMMON_STATE))
    if where is None:
        state = _load(file, file.read_bytes() if file.is_file() else None)
    elif file.exists():
        raise InputError(f"{file}: {path / '.metadata'} names {COMMON_STATE!r} too; a checkpoint has one of them")
    else:
        file = path / where.relative_path
        shards = _load(file, _read(path, where))  # a list of one, as Megatron stores every object
        state = shards[0] if isinstance(shards, list) and len(shards) == 1 else None
    if not isinstance(state, dict):
        raise InputError(f"{file}: damaged (the state that all ranks have in common is not a dictionary)")
    return state


def _read(path: Path, where: _StorageInfo) -> bytes:
    with (path / where.relative_path).open("rb") as file:
        file.seek(where.offset)
        return file.read(where.length)


def _check_places(path: Path, metadata: Metadata) -> None:
    sizes: dict[str, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and _EXTRA_STATE not in key and key != COMMON_STATE:
            raise InputError(f"{path / '.metadata'}: {key!r} is kept as an object, which would be unpickled")
    for index, where in metadata.storage_data.items():
        name = where.relative_path
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"{path / '.metadata'}: {index.fqn!r} lies in {name!r}, outside of the checkpoint")
        if getattr(where, "transform_descriptors", None):
            raise InputError(f"{path / '.metadata'}: {index.fqn!r} is stored with transforms; supported: none")
        if name not in sizes:
            file = path / name
            if file.is_symlink() or not file.is_file():
                raise InputError(f"{file}: {'a link' if file.is_symlink() else 'missing'}; {index.fqn!r} lies there")
            sizes[name] = file.stat().st_size
        if where.offset < 0 or where.length < 0 or where.offset + where.length > sizes[name]:
            raise InputError(f"{path / name}: {index.fqn!r} lies beyond its end ({sizes[name]} bytes): truncated?")


def _load(file: Path, content: bytes | None) -> Any:
    """What `torch.save` wrote, if it is nothing but data."""
    if content is None:
        raise InputError(f"{file} is missing")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise anything
        message = str(error)
        if "Unsupported" in message or "weights_only" in message or "GLOBAL" in message:
            reason = message.split("WeightsUnpickler error: ")[-1].splitlines()[0]
            raise InputError(f"{file}: holds more than data, and would run code when it is read ({reason})") from None
        raise InputError(f"{file}: damaged ({(message.splitlines() or [type(error).__name__])[0]})") from None


def _check_object(file: Path, key: str, content: bytes) -> None:
    """An extra state that is empty, as that of layers without FP8 is; a full one is a pickle within a tensor."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise InputError(f"{file}: the object {key!r} is not what torch.save writes, and would be unpickled")
    if not _is_empty(_load(file, content)):
        raise InputError(
            f"{file}: {key!r} is not empty: the extra state of FP8 layers is a pickle, and is not loaded; allowed: "
            "checkpoints of layers without FP8"
        )


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):  # Megatron stores a list of one
        return all(_is_empty(part) for part in value)
    return value is None or (isinstance(value, torch.Tensor) and value.numel() == 0)
