"""The guard in front of Megatron's checkpoint reader, which unpickles what it finds.

`dist_checkpointing.load` takes `.metadata` with `pickle.load`, entries that the metadata calls bytes with
`torch.load(weights_only=False)`, the reader by the names in `metadata.json`, and `common.pt` as
`TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD` says. Transformer Engine unpickles its layers' extra state once more by
itself. So all of these are looked at first, with readers that run nothing; what is not plainly data is refused.

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
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_coreward.checkpoint.torch_dist import read_metadata
from megatron_coreward.errors import InputError

_UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_EXTRA_STATE = "_extra_state"


def check_no_code(path: Path) -> None:
    """Makes sure that Megatron can read a distributed checkpoint without running anything out of it.

    Args:
        path: the directory with `.metadata`, `common.pt` and the `.distcp` files.

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
    _load(path / "common.pt", (path / "common.pt").read_bytes() if (path / "common.pt").is_file() else None)
    for file in path.glob("*.pt"):
        if file.name != "common.pt":
            raise InputError(f"{file}: no file of a checkpoint of this project; it would be unpickled")
    for index, where in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (path / where.relative_path).open("rb") as file:
                file.seek(where.offset)
                content = file.read(where.length)
            _check_object(path / where.relative_path, index.fqn, content)


def _check_places(path: Path, metadata: Metadata) -> None:
    sizes: dict[str, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and _EXTRA_STATE not in key:
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
