"""A hash of every tensor of a converted model, under its HF name: any later reader can check what it reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_coreward.errors import InputError

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class TensorHash:
    dtype: str
    shape: tuple[int, ...]
    blake3: str  # of the row-major little-endian bytes


def write_manifest(folder: Path, tensors: Mapping[str, TensorHash], ignored: list[str]) -> None:
    """Args:
    ignored: tensors of the source that have no place in the target because they follow from others.
    """
    content = {
        "format": 1,
        "hash": "blake3",
        "ignored": sorted(ignored),
        "tensors": {name: asdict(tensors[name]) for name in sorted(tensors)},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, TensorHash] | None:
    """The hashes beside a model; None if there are none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != 1:
            raise ValueError(f"format {content['format']!r}; supported: 1")
        return {
            name: TensorHash(str(entry["dtype"]), tuple(entry["shape"]), str(entry["blake3"]))
            for name, entry in content["tensors"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: damaged ({type(e).__name__}: {e})") from None
