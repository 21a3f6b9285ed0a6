"""Checkpoints from Hugging Face to Megatron and back, without a model and without the weights in memory.

    to-megatron   SRC (HF directory)              -> DST: torch_dist files, hf/ (config, tokenizer), manifest.json
    to-hf         SRC (Megatron checkpoint)       -> DST: safetensors, config, tokenizer, manifest.json

Weights pass in pieces of rows: read from the source into a buffer where they belong, hashed, cast if asked to, written.
Threads share the work: reading, hashing and writing leave Python to itself, and processes would each bring a third of
a gigabyte of libraries.

Invariants (tests/checkpoint/test_convert.py):
  1. Every tensor of the source is consumed exactly once, every tensor of the target produced exactly once.
  2. A target appears whole, or not at all.
  3. A worker holds two pieces (three with a cast) of at most PIECE_BYTES or one row, whatever the model's size.
"""

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from blake3 import blake3

from megatron_coreward.checkpoint.hf_description import copy_description
from megatron_coreward.checkpoint.manifest import MANIFEST, TensorHash, write_manifest
from megatron_coreward.checkpoint.safetensors_files import HfWeights, HfWriter, bytes_of
from megatron_coreward.checkpoint.torch_dist import MegatronWeights, MegatronWriter
from megatron_coreward.config.architecture import Architecture, read_architecture
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.weights.checkpoint_keys import CheckpointTensor, checkpoint_tensors
from megatron_coreward.weights.mapping import hf_tensors

PIECE_BYTES = 32 * 2**20
DESCRIPTION = "hf"  # in a Megatron checkpoint: what the HF directory holds beside weights
FREE_MARGIN = 64 * 2**20

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class WeightFiles(Protocol):
    """A checkpoint of either format, by HF names (`HfWeights`, `MegatronWeights`)."""

    def dtype(self, name: str) -> torch.dtype: ...
    def read_rows(self, name: str, first_row: int, out: torch.Tensor) -> None: ...
    def close(self) -> None: ...


def to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes the HF model in `source` as a Megatron checkpoint, readable under any layout and either layer spec.

    Raises:
        InputError: the source is damaged or not what its config says; the target exists; a cast would overflow.
        RunError: no room on the disk.
    """
    arch = read_architecture(source)
    with ExitStack() as stack:
        weights = HfWeights(source)
        stack.callback(weights.close)
        ignored = weights.check(arch)
        tensors = list(checkpoint_tensors(arch))
        dtypes = {name: dtype or weights.dtype(name) for name in hf_tensors(arch)}
        _check_tied_head(weights, arch, ignored)
        sizes = [math.prod(t.shape) * dtypes[t.runs[0].hf_name].itemsize for t in tensors]
        folder = stack.enter_context(new_directory(target, sum(sizes)))
        writer = MegatronWriter(folder)
        pieces = {t.name: _announce(writer, t, dtypes[t.runs[0].hf_name]) for t in tensors}
        hashes = _Hashes(hf_tensors(arch), dtypes)
        count = _Count(sum(sizes), progress)

        def work(share: Sequence[int], number: int) -> None:
            file_name = f"__{number}_0.distcp"
            with (folder / file_name).open("wb", buffering=0) as stream:
                for place in share:
                    tensor = tensors[place]
                    for first_row, rows, index in pieces[tensor.name]:
                        count.check()
                        piece = _read_piece(weights, tensor, first_row, rows, dtypes, hashes)
                        writer.write(stream, file_name, index, piece)
                        count.add(piece.nbytes)
                os.fsync(stream.fileno())

        _share_out(sizes, workers, work, count)
        writer.finish()
        (folder / DESCRIPTION).mkdir()
        stored = {dtypes[name] for name in dtypes}
        copy_description(source, folder / DESCRIPTION, stored.pop() if len(stored) == 1 else None)
        (folder / DESCRIPTION / MANIFEST).unlink(missing_ok=True)
        write_manifest(folder, hashes.done(), ignored)


def to_hf(
    source: Path,
    target: Path,
    *,
    hf_path: Path | None = None,
    weights: str = "policy",
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    workers: int = 2,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a Megatron checkpoint (a converted one, one of a run, any `torch_dist` one of this architecture) as an HF
    model directory with files of at most `shard_bytes`.

    Args:
        hf_path: directory with config.json and the tokenizer; None: the one that the checkpoint brings.
        weights: `policy`, or `teacher`: the EMA teacher of a run's checkpoint.

    Raises:
        InputError, RunError: as `to_megatron`.
    """
    source = megatron_directory(source)
    description = describing_directory(source, hf_path)
    arch = read_architecture(description)
    with ExitStack() as stack:
        stored = MegatronWeights(source, arch, prefix="teacher." if weights == "teacher" else "")
        stack.callback(stored.close)
        shapes = hf_tensors(arch)
        dtypes = {name: dtype or stored.dtype(name) for name in shapes}
        sizes = [math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()]
        folder = stack.enter_context(new_directory(target, sum(sizes)))
        writer = HfWriter(folder, shapes, dtypes, shard_bytes)
        stack.callback(writer.close)
        hashes = _Hashes(shapes, dtypes)
        count = _Count(sum(sizes), progress)
        names = list(shapes)

        def work(share: Sequence[int], number: int) -> None:
            for place in share:
                name = names[place]
                for first_row, piece in pieces_of(stored, name, shapes[name]):
                    count.check()
                    written = cast(name, piece, dtypes[name])
                    hashes.update(name, written)
                    writer.write_rows(name, first_row, written)
                    count.add(written.nbytes)

        _share_out(sizes, workers, work, count)
        writer.sync()
        several = set(dtypes.values())
        copy_description(description, folder, several.pop() if len(several) == 1 else None)
        write_manifest(folder, hashes.done(), [])


def megatron_directory(path: Path) -> Path:
    """The distributed checkpoint itself: the directory, or the one inside a checkpoint of a run."""
    inner = path / "megatron"
    return inner if not (path / "metadata.json").is_file() and (inner / "metadata.json").is_file() else path


def describing_directory(source: Path, hf_path: Path | None) -> Path:
    """Where config.json and the tokenizer of a Megatron checkpoint are.

    Raises:
        InputError: the checkpoint brings none and none is named.
    """
    if hf_path is not None:
        return hf_path
    for folder in (source / DESCRIPTION, source.parent / DESCRIPTION):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"{source} has no {DESCRIPTION}/config.json: name the model's Hugging Face directory with --hf-path"
    )


def pieces_of(
    weights: WeightFiles, name: str, shape: tuple[int, ...], piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a tensor from top to bottom."""
    dtype = weights.dtype(name)
    step = max(1, piece_bytes // (math.prod(shape[1:]) * dtype.itemsize))
    for first in range(0, shape[0], step):
        piece = torch.empty((min(step, shape[0] - first), *shape[1:]), dtype=dtype)
        weights.read_rows(name, first, piece)
        yield first, piece


def cast(name: str, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The piece in another dtype. Raises InputError where a finite value would become infinite."""
    if piece.dtype == dtype:
        return piece
    result = piece.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(piece.dtype).max and bool((result.isinf() & ~piece.isinf()).any()):
        raise InputError(f"tensor {name!r} has values beyond the range of {dtype}; choose another --dtype")
    return result


def _announce(writer: MegatronWriter, tensor: CheckpointTensor, dtype: torch.dtype) -> list[tuple[int, int, Any]]:
    """(first row, rows, index) of the chunks of a slice."""
    step = max(1, PIECE_BYTES // (tensor.row_size * dtype.itemsize))
    firsts = range(0, tensor.shape[0], step)
    return [(f, rows, writer.add(tensor, dtype, f, rows)) for f in firsts for rows in (min(step, tensor.shape[0] - f),)]


def _read_piece(
    weights: HfWeights,
    tensor: CheckpointTensor,
    first_row: int,
    rows: int,
    dtypes: dict[str, torch.dtype],
    hashes: "_Hashes",
) -> torch.Tensor:
    """Rows of a Megatron slice, each run of them read into its place."""
    names = {run.hf_name for run in tensor.runs}
    sources = {weights.dtype(name) for name in names}
    dtype = dtypes[tensor.runs[0].hf_name]
    if len({dtypes[name] for name in names}) > 1:
        raise InputError(f"tensors of {tensor.name!r} have different dtypes ({', '.join(sorted(names))}): set --dtype")
    piece = torch.empty((rows, *tensor.shape[1:]), dtype=dtype)
    for run in tensor.runs:
        start, stop = max(first_row, run.row), min(first_row + rows, run.row + run.rows)
        if start >= stop:
            continue
        target = piece[start - first_row : stop - first_row]
        if sources == {dtype}:
            weights.read_rows(run.hf_name, run.hf_row + start - run.row, target)
        else:
            source = torch.empty(target.shape, dtype=weights.dtype(run.hf_name))
            weights.read_rows(run.hf_name, run.hf_row + start - run.row, source)
            target.copy_(cast(run.hf_name, source, dtype))
        hashes.update(run.hf_name, target)
    return piece


def _check_tied_head(weights: HfWeights, arch: Architecture, unneeded: Sequence[str]) -> None:
    """A tied model may repeat the embedding as its head, but nothing else."""
    if arch.tied and "lm_head.weight" in unneeded:
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        shape = weights.tensors[head].shape
        same = shape == weights.tensors[embedding].shape and all(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(
                pieces_of(weights, embedding, shape), pieces_of(weights, head, shape), strict=True
            )
        )
        if not same:
            raise InputError(
                f"{weights.path}: config.json has tie_word_embeddings true, but {head!r} is not the embedding"
            )


class _Hashes:
    """Running hashes of HF tensors whose rows arrive from top to bottom."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> None:
        self._shapes, self._dtypes = shapes, dtypes
        self._hashes = {name: blake3() for name in shapes}
        self._bytes = dict.fromkeys(shapes, 0)

    def update(self, name: str, rows: torch.Tensor) -> None:
        self._hashes[name].update(bytes_of(rows))
        self._bytes[name] += rows.nbytes

    def done(self) -> dict[str, TensorHash]:
        """Raises RunError unless every byte of every tensor has passed exactly once."""
        for name, shape in self._shapes.items():
            total = math.prod(shape) * self._dtypes[name].itemsize
            if self._bytes[name] != total:
                raise RunError(f"tensor {name!r}: {self._bytes[name]} of {total} bytes were converted")
        return {
            name: TensorHash(str(self._dtypes[name]).removeprefix("torch."), shape, self._hashes[name].hexdigest())
            for name, shape in self._shapes.items()
        }


class _Count:
    """Progress over all workers, and the word to stop when one of them has failed."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._lock, self._done, self._total, self._progress = threading.Lock(), 0, total, progress
        self.stop = threading.Event()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)

    def check(self) -> None:
        if self.stop.is_set():
            raise _Stopped


class _Stopped(Exception):
    pass


def _share_out(sizes: Sequence[int], workers: int, work: Callable[[Sequence[int], int], None], count: _Count) -> None:
    """Gives every worker about the same number of bytes, in runs of neighbours, and raises the first error."""
    shares: list[list[int]] = [[] for _ in range(max(1, min(workers, len(sizes))))]
    total, before = sum(sizes), 0
    for place, size in enumerate(sizes):
        shares[min(len(shares) - 1, before * len(shares) // total)].append(place)
        before += size
    with ThreadPoolExecutor(len(shares), "convert") as pool:
        futures = [pool.submit(work, share, number) for number, share in enumerate(shares)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            count.stop.set()
            wait(futures)
    errors = [e for e in (f.exception() for f in futures) if e is not None and not isinstance(e, _Stopped)]
    if errors:
        raise errors[0]


@contextmanager
def new_directory(target: Path, nbytes: int) -> Iterator[Path]:
    """A directory that gets its name when it is complete, and is removed if anything goes wrong before, SIGTERM
    included.

    Raises:
        InputError: the target exists, or its parent does not.
        RunError: the disk has less than `nbytes` left, or runs full.
    """
    if target.exists():
        raise InputError(f"{target} exists; choose another target, or remove it first")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{parent} is no directory, so {target.name} cannot be made in it")
    free = shutil.disk_usage(parent).free
    if free < nbytes + FREE_MARGIN:
        raise RunError(f"{target} needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {parent}")
    partial = parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with _terminable():
            yield partial
            os.rename(partial, target)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{target} could not be written: {e.strerror} ({e.filename or parent})") from e
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block with KeyboardInterrupt, so that what it has begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
