"""The weights of a Hugging Face model directory, tensor by tensor, without holding the model in memory.

The safetensors library reads by mapping whole files (which then count as resident memory) and writes only what is in
memory whole; a converter of models larger than memory does neither. The format itself is eight bytes, a JSON header
and the tensors' bytes; checking it strictly is half of the work.

Invariants (tests/checkpoint/test_safetensors_files.py):
  1. A file is accepted only if its tensors tile its data exactly: nothing truncated, no hole, no overlap, nothing left.
  2. A name has one file: two files with it, or an index that says another file, is an error; so is a file beside those
     that the index names, as readers do not agree on which of the two to take.
  3. Every tensor of a file that is written starts at a multiple of its element size.
"""

import json
import math
import operator
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_coreward.checkpoint.pieces import PIECE_BYTES, OpenFiles, Scratch, bytes_of, pieces_of, write_at
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.mapping import hf_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, as the library has it
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LEGACY_BUFFER = "rotary_emb.inv_freq"  # old checkpoints carry this function of the config


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies; row-major, little-endian."""

    file: Path
    start: int  # byte in the file
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class HfWeights:
    """The tensors of a model directory, checked against its files and its index when it is opened."""

    def __init__(self, path: Path) -> None:
        """Raises InputError naming the file and what is wrong with it."""
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        for file, allowed in _files(path).items():
            found = read_header(file)
            for name, tensor in found.items():
                if name in self.tensors:
                    raise InputError(f"tensor {name!r} is in {self.tensors[name].file.name} and in {file}")
                self.tensors[name] = tensor
            if allowed is not None and allowed != set(found):
                name = min(allowed ^ set(found))
                where = "does not hold it" if name in allowed else "holds it"
                raise InputError(f"{path / INDEX} disagrees with {file.name} on tensor {name!r}: the file {where}")
        self._files = OpenFiles()

    def check(self, arch: Architecture) -> list[str]:
        """Checks that these are the tensors of the architecture, no more and no less.

        Returns the names that are not needed: a tied model's head, which is read and repeats the embedding, and buffers
        that follow from the config.

        Raises:
            InputError: tensors are missing, left over or of another shape, or a tied model has a head of its own.
        """
        expected = hf_tensors(arch)
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise InputError(f"{self.path}: {len(missing)} tensors are missing, first {missing[0]!r}")
        unneeded = [
            name for name in self.tensors if name.endswith(_LEGACY_BUFFER) or (arch.tied and name == "lm_head.weight")
        ]
        extra = [name for name in self.tensors if name not in expected and name not in unneeded]
        if extra:
            raise InputError(
                f"{self.path}: {len(extra)} tensors have no place in a {arch.family} model, first {extra[0]!r}"
            )
        for name, shape in expected.items():
            if self.tensors[name].shape != shape:
                raise InputError(
                    f"{self.path}: tensor {name!r} has shape {self.tensors[name].shape}, config.json asks for {shape}"
                )
        if "lm_head.weight" in unneeded and not self._same("lm_head.weight", "model.embed_tokens.weight"):
            raise InputError(
                f"{self.path}: config.json has tie_word_embeddings true, but 'lm_head.weight' is not the embedding"
            )
        return unneeded

    def _same(self, one: str, other: str) -> bool:
        a, b = self.tensors[one], self.tensors[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        ours, theirs = (pieces_of(self, name, a.shape, PIECE_BYTES, Scratch()) for name in (one, other))
        return all(bytes_of(rows) == bytes_of(others) for (_, rows), (_, others) in zip(ours, theirs, strict=True))

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read_rows(self, name: str, first_row: int, out: torch.Tensor, first_column: int = 0) -> None:
        """Fills `out`, which is contiguous and of the tensor's dtype, with rows from `first_row` on; if it is
        narrower than they are, with the columns from `first_column` on."""
        tensor = self.tensors[name]
        columns, item = math.prod(tensor.shape[1:]), tensor.dtype.itemsize
        start = tensor.start + first_row * columns * item
        if out.numel() == len(out) * columns:
            self._files.read(tensor.file, start, out)
            return
        rows = torch.empty(len(out), columns, dtype=out.dtype)
        self._files.read(tensor.file, start, rows)
        out.view(len(out), -1).copy_(rows[:, first_column : first_column + out.numel() // len(out)])

    def close(self) -> None:
        self._files.close()


def _files(path: Path) -> dict[Path, set[str] | None]:
    """The files of a model, each with the names that the index says it holds (None without an index)."""
    index = path / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(), object_pairs_hook=_unique)["weight_map"]
            files: dict[Path, set[str] | None] = {path / str(file): set() for file in weight_map.values()}
            for name, file in weight_map.items():
                names = files[path / str(file)]
                assert names is not None
                names.add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{index}: not an index of safetensors files ({type(e).__name__}: {e})") from None
        for file in files:
            if file.parent != path:
                raise InputError(f"{index} names {file}, which is outside of the model's directory")
            if not file.is_file():
                raise InputError(f"{index} names {file.name}, which does not exist")
        beside = sorted(set(path.glob("*.safetensors")) - set(files))
        if beside:
            raise InputError(
                f"{path}: {beside[0].name} lies beside the files that {INDEX} names; remove one or the other"
            )
        return dict(sorted(files.items()))
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise InputError(f"no *.safetensors files in {path}")
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in found)):
        for number in range(1, int(match[3]) + 1):
            name = f"{match[1]}-{number:05d}-of-{match[3]}.safetensors"
            if not (path / name).is_file():
                raise InputError(f"{path}: {name} is missing")
    return dict.fromkeys(found)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        InputError: the file is no safetensors file, or breaks invariant 1.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise InputError(f"{file}: not a safetensors file, or truncated: a header of {length} bytes in {size}")
            header: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{file}: not a readable safetensors file ({type(e).__name__}: {e})") from None
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            raise InputError(f"{file}: tensor {name!r} starts at byte {tensor.start}, expected {position}")
        position += tensor.nbytes
    if position != size:
        what = "truncated" if size < position else "bytes are left over"
        raise InputError(f"{file}: {what}: {size} bytes, its header asks for {position}")
    return tensors


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} appears twice")
        found[key] = value
    return found


def _stored(file: Path, data: int, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor {name!r} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}")
    start, stop = entry["data_offsets"]
    tensor = StoredTensor(file, data + start, tuple(map(operator.index, entry["shape"])), DTYPES[entry["dtype"]])
    if min(tensor.shape, default=0) < 0:
        raise InputError(f"{file}: tensor {name!r} has shape {tensor.shape}")
    if stop - start != tensor.nbytes:
        raise InputError(
            f"{file}: tensor {name!r} has {stop - start} bytes, its shape and dtype ask for {tensor.nbytes}"
        )
    return tensor


class HfWriter:
    """Writes the weight files of a model directory: every file at its full size first, then tensors in any order."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], shard_bytes: int
    ) -> None:
        self._open: dict[Path, int] = {}
        self.tensors: dict[str, StoredTensor] = {}
        sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
        shards = _shards(sizes, shard_bytes)
        try:
            for number, names in enumerate(shards, 1):
                several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._create(folder / (several if len(shards) > 1 else "model.safetensors"), names, shapes, dtypes)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {name: tensor.file.name for name, tensor in sorted(self.tensors.items())},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _create(
        self,
        file: Path,
        names: list[str],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        names = sorted(names, key=lambda name: -dtypes[name].itemsize)  # keeps every one aligned
        for name in names:
            end = position + math.prod(shapes[name]) * dtypes[name].itemsize
            header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shapes[name], "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
        self._open[file] = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        write_at(self._open[file], 0, memoryview(struct.pack("<Q", len(text)) + text))
        os.ftruncate(self._open[file], 8 + len(text) + position)
        for name in names:
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self.tensors[name] = StoredTensor(file, start, shapes[name], dtypes[name])

    def write_rows(self, name: str, first_row: int, rows: torch.Tensor) -> None:
        """Writes contiguous rows of a tensor to their place."""
        tensor = self.tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        write_at(self._open[tensor.file], tensor.start + first_row * row_bytes, bytes_of(rows))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into files of at most `shard_bytes`; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
