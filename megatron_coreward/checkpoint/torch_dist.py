"""Megatron's `torch_dist` checkpoints, chunk by chunk, without building a model or holding one in memory.

The format is PyTorch's distributed checkpoint: `.metadata` says which chunk of which global tensor lies where, and a
chunk is what `torch.save` wrote for it, at an offset of a `.distcp` file. Reading takes rows out of the middle of a
chunk: `torch.save` stores a tensor's bytes as they are, and PyTorch says where.

Invariants (tests/checkpoint/test_torch_dist.py):
  1. Nothing that could run code is unpickled: metadata by an allowlist, chunks with `weights_only`.
  2. The chunks of every slice that is read tile it exactly once.
  3. A chunk that is written is on its way to the disk in full, or an error is raised.
"""

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config as serialization_config

from megatron_coreward.checkpoint.pieces import OpenFiles, write_at
from megatron_coreward.checkpoint.safetensors_files import DTYPES
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import TensorMeta, check_tiling
from megatron_coreward.weights.checkpoint_keys import (
    CheckpointTensor,
    RowRun,
    checkpoint_tensors,
    is_other_state,
    spellings,
)

DESCRIPTION = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# All that the metadata of a distributed checkpoint is made of; none of it does anything when it is called.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", n)
        for n in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in (*DTYPES.values(), torch.uint8, torch.int64)),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint.

    Raises:
        InputError: no `torch_dist` checkpoint, or one whose metadata would run code.
    """
    description = path / "metadata.json"
    try:
        backend = json.loads(description.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise InputError(f"{path}: no metadata.json, so this is no Megatron distributed checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{description}: damaged ({type(e).__name__}: {e})") from None
    if backend != "torch_dist":
        raise InputError(f"{path}: a checkpoint of format {backend!r}; supported: torch_dist")
    try:
        with (path / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(f"{path / '.metadata'}: not readable ({type(e).__name__}: {e})") from None
    if not _is_well_formed(metadata):
        raise InputError(f"{path / '.metadata'}: not the metadata of a distributed checkpoint, or damaged")
    return metadata


def _is_well_formed(metadata: Any) -> bool:
    """Whether what was unpickled has the types that the rest of this file counts on."""

    def is_size(value: Any) -> bool:
        return isinstance(value, torch.Size)

    def is_entry(entry: Any) -> bool:
        return not isinstance(entry, TensorStorageMetadata) or (
            is_size(entry.size)
            and isinstance(entry.properties, TensorProperties)
            and all(
                isinstance(c, ChunkStorageMetadata)
                and is_size(c.offsets)
                and is_size(c.sizes)
                and len(c.offsets) == len(c.sizes) == len(entry.size)
                for c in entry.chunks
            )
        )

    try:
        return isinstance(metadata, Metadata) and all(
            (
                all(isinstance(key, str) and is_entry(e) for key, e in metadata.state_dict_metadata.items()),
                all(
                    isinstance(i, MetadataIndex)
                    and isinstance(w, _StorageInfo)
                    and isinstance(w.relative_path, str)
                    and isinstance(w.offset, int)
                    and isinstance(w.length, int)
                    for i, w in metadata.storage_data.items()
                ),
            )
        )
    except (AttributeError, TypeError):
        return False


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stored chunk of a slice: rows [row, row + rows) and columns [column, column + columns)."""

    where: _StorageInfo
    sizes: tuple[int, ...]  # of all that is stored there
    skip: int  # rows of other slices that lie before it in what is stored
    row: int
    rows: int
    column: int
    columns: int


class MegatronWeights:
    """A model's weights in a Megatron checkpoint, under their HF names, checked when it is opened."""

    def __init__(self, path: Path, arch: Architecture, prefix: str = "") -> None:
        """Args:
            prefix: of the keys, for another set of values than the weights (`teacher.`).

        Raises:
            InputError: no checkpoint, or not one of this architecture: tensors are missing, left over, of another
                shape, or stored incompletely.
        """
        self.path = path
        metadata = read_metadata(path)
        known = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
        }
        expected = list(checkpoint_tensors(arch))
        self._dtypes: dict[str, torch.dtype] = {}
        self._runs: dict[str, list[tuple[CheckpointTensor, RowRun]]] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], list[_Chunk]] = {}
        used: set[str] = set()
        places: dict[tuple[str, int], str] = {}
        for tensor in expected:
            key = next((prefix + k for k in spellings(tensor.key) if prefix + k in known), None)
            if key is None:
                raise InputError(f"{path}: tensor {prefix + tensor.key!r} is missing")
            if key not in used:
                used.add(key)
                self._check_shape(key, known[key], tensor, arch)
                self._collect(key, known[key], tensor, metadata, places)
            self._check_slice(key, tensor, known[key].size)
            for run in tensor.runs:
                self._dtypes[run.hf_name] = known[key].properties.dtype
                self._runs.setdefault(run.hf_name, []).append((tensor, run))
        extra = [key for key in known if key not in used and (prefix or not is_other_state(key))]
        if extra:
            raise InputError(f"{path}: {len(extra)} tensors have no place in a {arch.family} model, first {extra[0]!r}")
        self._key = {t.key: next(prefix + k for k in spellings(t.key) if prefix + k in used) for t in expected}
        self._files = OpenFiles()
        self._data_start: dict[tuple[str, int], int] = {}

    def _check_shape(
        self, key: str, entry: TensorStorageMetadata, tensor: CheckpointTensor, arch: Architecture
    ) -> None:
        found, wanted = tuple(entry.size), tensor.global_shape
        padded = tensor.name in ("embedding.word_embeddings.weight", "output_layer.weight") and found[0] > wanted[0]
        if found != wanted and not (padded and found[1:] == wanted[1:]):
            raise InputError(
                f"{self.path}: tensor {key!r} has shape {found}, the {arch.family} config asks for {wanted}"
            )
        if entry.properties.dtype not in DTYPES.values():
            raise InputError(f"{self.path}: tensor {key!r} has dtype {entry.properties.dtype}; supported: floats")

    def _collect(
        self,
        key: str,
        entry: TensorStorageMetadata,
        tensor: CheckpointTensor,
        metadata: Metadata,
        places: dict[tuple[str, int], str],
    ) -> None:
        """Sorts the chunks of a global tensor by the slice that they belong to; `places` are those taken, by key."""
        leads = len(tensor.lead)
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if not all(0 <= o < o + n <= whole for o, n, whole in zip(offsets, sizes, entry.size, strict=True)):
                raise InputError(f"{self.path}: a chunk of {key!r} at {offsets} of size {sizes} is not inside of it")
            where = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if where is None:
                raise InputError(f"{self.path}: the chunk of {key!r} at {offsets} is not stored anywhere")
            place = (where.relative_path, where.offset)
            if place in places:
                raise InputError(f"{self.path}: chunks of {places[place]!r} and {key!r} lie in one place, {place}")
            places[place] = key
            if where.transform_descriptors:
                raise InputError(f"{self.path}: {key!r} is stored with {where.transform_descriptors}; supported: none")
            column, columns = (offsets[leads + 1], sizes[leads + 1]) if len(sizes) > leads + 1 else (0, 1)
            for number, lead in enumerate(_places(offsets[:leads], sizes[:leads])):
                skip = number * sizes[leads]
                self._chunks.setdefault((key, lead), []).append(
                    _Chunk(where, sizes, skip, offsets[leads], sizes[leads], column, columns)
                )

    def _check_slice(self, key: str, tensor: CheckpointTensor, size: Sequence[int]) -> None:
        chunks = self._chunks.get((key, tensor.lead), [])
        shape = (size[len(tensor.lead)], tensor.row_size)
        label = f"{key} {list(tensor.lead)}" if tensor.lead else key
        indices = [(slice(c.row, c.row + c.rows), slice(c.column, c.column + c.columns)) for c in chunks]
        try:
            check_tiling([TensorMeta(label, shape, "float32")], [(label, index) for index in indices])
        except ValueError as e:
            raise InputError(f"{self.path}: {e}") from None

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read_rows(self, name: str, first_row: int, out: torch.Tensor, first_column: int = 0) -> None:
        """Fills `out`, which is contiguous and of the tensor's dtype, with rows from `first_row` of an HF tensor on;
        if it is narrower than they are, with the columns from `first_column` on, and chunks of others are not
        read."""
        stop = first_row + out.shape[0]
        grid = out.view(out.shape[0], -1)
        for tensor, run in self._runs[name]:
            start, end = max(first_row, run.hf_row), min(stop, run.hf_row + run.rows)
            if start < end:
                part = grid[start - first_row : end - first_row]
                self._read_slice(tensor, run.row + start - run.hf_row, first_column, part)

    def _read_slice(self, tensor: CheckpointTensor, first_row: int, first_column: int, out: torch.Tensor) -> None:
        """Fills `out` [rows, columns] with the part of a slice that begins at a row and a column."""
        dtype, (height, width) = out.dtype, out.shape
        for chunk in self._chunks[self._key[tensor.key], tensor.lead]:
            start, end = max(first_row, chunk.row), min(first_row + height, chunk.row + chunk.rows)
            left, right = max(first_column, chunk.column), min(first_column + width, chunk.column + chunk.columns)
            if start >= end or left >= right:
                continue
            path, data = self._locate(chunk, tensor.key, dtype)
            byte = data + (chunk.skip + start - chunk.row) * chunk.columns * dtype.itemsize
            target = out[start - first_row : end - first_row, left - first_column : right - first_column]
            if target.is_contiguous() and right - left == chunk.columns:
                self._files.read(path, byte, target)
            else:
                rows = torch.empty(end - start, chunk.columns, dtype=dtype)
                self._files.read(path, byte, rows)
                target.copy_(rows[:, left - chunk.column : right - chunk.column])

    def _locate(self, chunk: _Chunk, key: str, dtype: torch.dtype) -> tuple[Path, int]:
        """The file of a chunk and the byte where the chunk's elements start."""
        where = chunk.where
        path = self.path / where.relative_path
        if path.parent != self.path:
            raise InputError(f"{self.path}: a chunk of {key!r} lies in {path}, outside of the checkpoint")
        place = (where.relative_path, where.offset)
        if place not in self._data_start:
            self._data_start[place] = _data_start(path, chunk, key, dtype)
        return path, self._data_start[place]

    def close(self) -> None:
        self._files.close()


def _places(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not offsets:
        yield ()
        return
    for first in range(offsets[0], offsets[0] + sizes[0]):
        for rest in _places(offsets[1:], sizes[1:]):
            yield (first, *rest)


def _data_start(path: Path, chunk: _Chunk, key: str, dtype: torch.dtype) -> int:
    """The byte of a file at which the elements of the chunk that `torch.save` wrote start, row by row."""
    where = chunk.where
    try:
        with path.open("rb") as file:
            view: Any = _create_file_view(file, where.offset, where.length)
            archive: Any = torch._C.PyTorchFileReader(view)
            start: int = archive.get_record_offset("data/0")
            view.seek(0)
            stored = torch.load(view, map_location="meta", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it holds a chunk of {key!r}") from None
    except Exception as e:  # a damaged archive can raise anything
        message = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: the chunk of {key!r} at byte {where.offset} is damaged ({message})") from None
    if not (
        isinstance(stored, torch.Tensor)
        and stored.dtype == dtype
        and stored.is_contiguous()
        and stored.storage_offset() == 0
        and tuple(stored.shape) == chunk.sizes
    ):
        raise InputError(f"{path}: the chunk of {key!r} at byte {where.offset} is not what .metadata says")
    return where.offset + start


class ChunkFile:
    """A `.distcp` file being written. `torch.save` does not look at how much of a write was done, so this one does."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.size = 0
        self.error: OSError | None = None
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            write_at(self._file, self.size, view)
        except OSError as e:
            self.error = e
            raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        os.close(self._file)


class MegatronWriter:
    """Writes chunks of a model's weights; several threads may, each to a file of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._results: list[WriteResult] = []

    def add(self, tensor: CheckpointTensor, dtype: torch.dtype, first_row: int, rows: int) -> MetadataIndex:
        """Announces a chunk of a slice: rows from `first_row` on. To be called in one thread."""
        entry = self._entries.setdefault(
            tensor.key,
            TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor.global_shape), []),
        )
        if entry.properties.dtype != dtype:
            raise InputError(
                f"{tensor.name!r} is {dtype}, but {tensor.key!r} of other layers is {entry.properties.dtype}: "
                "choose one with --dtype"
            )
        rest = tensor.shape[1:]
        offsets = torch.Size((*tensor.lead, first_row, *(0 for _ in rest)))
        sizes = torch.Size((*(1 for _ in tensor.lead), rows, *rest))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        return MetadataIndex(tensor.key, offsets)

    def write(self, file: ChunkFile, index: MetadataIndex, chunk: torch.Tensor) -> None:
        """Appends an announced chunk to a file; `chunk` has the chunk's rows, and a storage of just their size."""
        lead = len(index.offset or ()) - chunk.dim()
        offset = file.size
        try:
            # No reader looks at the archive's CRC-32, which takes longer than all the rest; the manifest has hashes.
            with serialization_config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(chunk.view((1,) * lead + chunk.shape), cast(Any, file))
        except RuntimeError:
            if file.error is not None:  # torch speaks of an archive only
                raise file.error from None
            raise
        where = _StorageInfo(file.name, offset, file.size - offset)
        self._results.append(WriteResult(index=index, size_in_bytes=where.length, storage_data=where))

    def finish(self, extra_state_keys: Iterable[str]) -> None:
        """Writes what describes the chunks, when all are written, and nothing much under the keys of extra states."""
        file_name = "extra_state.distcp"
        torch.save([None], self._folder / file_name)  # as Megatron writes the extra state of a layer without FP8
        where = _StorageInfo(file_name, 0, (self._folder / file_name).stat().st_size)
        entries: dict[str, STORAGE_TYPES] = dict(self._entries)
        for key in extra_state_keys:
            entries[key] = BytesStorageMetadata()
            self._results.append(WriteResult(MetadataIndex(key), where.length, where))
        FileSystemWriter(self._folder).finish(Metadata(entries), [self._results])
        torch.save({}, self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(DESCRIPTION))
