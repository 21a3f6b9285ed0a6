"""Weights on their way: rows of tensors, in pieces of bounded size, read and written at their place in a file."""

import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_coreward.errors import InputError

PIECE_BYTES = 16 * 2**20  # a piece holds at most this, or one row

# Linux answers larger writes with page-cache folios of that size: on ext4 (6.18), 1 MiB at a time took 8 times as long.
WRITE_BYTES = 256 * 2**10


class WeightFiles(Protocol):
    """A checkpoint of either format, by HF names (`HfWeights`, `MegatronWeights`)."""

    def dtype(self, name: str) -> torch.dtype: ...
    def read_rows(self, name: str, first_row: int, out: torch.Tensor, first_column: int = 0) -> None: ...
    def close(self) -> None: ...


class Scratch:
    """Memory for one piece after another: pages that are new cost as much as the copy that fills them."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An undefined tensor with a storage of exactly its size, valid until the next call."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > len(self._memory):
            self._memory = bytearray(nbytes)
        return torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape)).view(shape)


def cuts(shape: tuple[int, ...], itemsize: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of the pieces of a tensor, from top to bottom."""
    step = max(1, piece_bytes // (math.prod(shape[1:]) * itemsize))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


def pieces_of(
    weights: WeightFiles, name: str, shape: tuple[int, ...], piece_bytes: int, scratch: Scratch
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a tensor from top to bottom; the rows are in `scratch`."""
    dtype = weights.dtype(name)
    for first, rows in cuts(shape, dtype.itemsize, piece_bytes):
        piece = scratch.take((rows, *shape[1:]), dtype)
        weights.read_rows(name, first, piece)
        yield first, piece


def cast(name: str, piece: torch.Tensor, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    """The piece in another dtype. Raises InputError as `cast_into` does."""
    if piece.dtype == dtype:
        return piece
    result = scratch.take(tuple(piece.shape), dtype)
    cast_into(name, piece, result)
    return result


def cast_into(name: str, piece: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out`, of another dtype. Raises InputError if a finite value would become infinite."""
    out.copy_(piece)
    narrower = torch.finfo(out.dtype).max < torch.finfo(piece.dtype).max
    if narrower and bool(out.isinf().logical_and_(piece.isfinite()).any()):
        raise InputError(f"tensor {name!r} has values beyond the range of {out.dtype}; choose another --dtype")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class OpenFiles:
    """Files that are read at any place, each opened once; threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}

    def read(self, path: Path, start: int, out: torch.Tensor) -> None:
        """Fills a contiguous tensor from a byte on. Raises InputError if the file ends before or is unreadable."""
        rest = bytes_of(out)
        try:
            with self._lock:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
                file = self._files[path]
            while rest:
                count = os.preadv(file, [rest], start)
                if count == 0:
                    raise InputError(f"{path}: truncated: it ends at byte {start}, {len(rest)} bytes too early")
                rest, start = rest[count:], start + count
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror})") from None

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def write_at(file: int, start: int, data: memoryview) -> None:
    """Writes all of the data to an open file. (A single write may stop short without an error, on a full disk too.)"""
    rest = data
    while rest:
        count = os.pwrite(file, rest[:WRITE_BYTES], start)
        rest, start = rest[count:], start + count
