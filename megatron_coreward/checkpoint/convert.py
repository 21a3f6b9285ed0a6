"""Checkpoints from Hugging Face to Megatron and back, without a model and without the weights in memory.

    to-megatron   SRC (HF directory)              -> DST: torch_dist files, hf/ (config, tokenizer), manifest.json
    to-hf         SRC (Megatron checkpoint)       -> DST: safetensors, config, tokenizer, manifest.json

Weights pass in pieces of rows: read from the source into a buffer where they belong, cast if asked to, hashed, written.
Threads share the work: reading, hashing and writing leave Python to itself, and processes would each bring a third of
a gigabyte of libraries.

Invariants (tests/checkpoint/test_convert.py):
  1. Every tensor of the source is consumed exactly once, every tensor of the target produced exactly once.
  2. A target appears whole, or not at all.
  3. The buffers of all workers together hold at most BUFFER_BYTES, or some rows each, whatever the model's size.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from blake3 import blake3

from megatron_coreward.checkpoint.hf_description import copy_description
from megatron_coreward.checkpoint.manifest import MANIFEST, TensorHash, write_manifest
from megatron_coreward.checkpoint.new_directory import new_directory
from megatron_coreward.checkpoint.pieces import PIECE_BYTES, Scratch, bytes_of, cast, cast_into, cuts, pieces_of
from megatron_coreward.checkpoint.safetensors_files import HfWeights, HfWriter
from megatron_coreward.checkpoint.torch_dist import ChunkFile, MegatronWeights, MegatronWriter
from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.errors import InputError, RunError
from megatron_coreward.weights.checkpoint_keys import CheckpointTensor, checkpoint_tensors, extra_state_keys
from megatron_coreward.weights.mapping import hf_tensors

BUFFER_BYTES = 384 * 2**20  # of all workers
PIECES_A_WORKER = 3  # at once: as read, as written, and what the check of a cast takes
DESCRIPTION = "hf"  # in a Megatron checkpoint: what the HF directory holds beside weights

Progress = Callable[[int, int], None]  # bytes done, bytes in all


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
        weights = stack.enter_context(closing(HfWeights(source)))
        ignored = weights.check(arch)
        shapes = hf_tensors(arch)
        dtypes = {name: dtype or weights.dtype(name) for name in shapes}
        tensors = [(tensor, _stored_dtype(tensor, dtypes)) for tensor in checkpoint_tensors(arch)]
        sizes = [math.prod(tensor.shape) * stored.itemsize for tensor, stored in tensors]
        folder = stack.enter_context(new_directory(target, sum(sizes)))
        writer = MegatronWriter(folder)
        piece_bytes = _piece_bytes(workers)
        chunks = [
            [
                (first, rows, writer.add(t, stored, first, rows))
                for first, rows in cuts(t.shape, stored.itemsize, piece_bytes)
            ]
            for t, stored in tensors
        ]
        hashes = _Hashes(shapes, dtypes)

        def work(share: "_Share") -> None:
            read, written = Scratch(), Scratch()
            with closing(ChunkFile(folder / f"__{share.worker}_0.distcp")) as file:
                for place in share:
                    tensor, stored = tensors[place]
                    for first, rows, index in chunks[place]:
                        piece = written.take((rows, *tensor.shape[1:]), stored)
                        for run in tensor.runs:
                            start, stop = max(first, run.row), min(first + rows, run.row + run.rows)
                            if start >= stop:
                                continue
                            part, hf_row = piece[start - first : stop - first], run.hf_row + start - run.row
                            _read_cast(weights, run.hf_name, hf_row, part, read)
                            hashes.update(run.hf_name, part)
                        writer.write(file, index, piece)
                        share.done(piece.nbytes)

        _share_out(sizes, workers, work, progress)
        writer.finish(extra_state_keys(arch))
        (folder / DESCRIPTION).mkdir()
        copy_description(source, folder / DESCRIPTION, _only(dtypes.values()))
        (folder / DESCRIPTION / MANIFEST).unlink(missing_ok=True)
        write_manifest(folder, hashes.finish(), ignored)


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
        stored = stack.enter_context(closing(MegatronWeights(source, arch, key_prefix(weights))))
        shapes = hf_tensors(arch)
        names = list(shapes)
        dtypes = {name: dtype or stored.dtype(name) for name in names}
        sizes = [math.prod(shapes[name]) * dtypes[name].itemsize for name in names]
        folder = stack.enter_context(new_directory(target, sum(sizes)))
        writer = stack.enter_context(closing(HfWriter(folder, shapes, dtypes, shard_bytes)))
        piece_bytes = _piece_bytes(workers)
        hashes = _Hashes(shapes, dtypes)

        def work(share: "_Share") -> None:
            read, written = Scratch(), Scratch()
            for place in share:
                name = names[place]
                for first, piece in pieces_of(stored, name, shapes[name], piece_bytes, read):
                    rows = cast(name, piece, dtypes[name], written)
                    hashes.update(name, rows)
                    writer.write_rows(name, first, rows)
                    share.done(rows.nbytes)

        _share_out(sizes, workers, work, progress)
        copy_description(description, folder, _only(dtypes.values()))
        write_manifest(folder, hashes.finish(), [])


def key_prefix(weights: str) -> str:
    """Of the keys of a run's checkpoint under which `policy` or `teacher` weights are."""
    return "teacher." if weights == "teacher" else ""


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
    inside = source / DESCRIPTION
    beside = source.parent / DESCRIPTION if source.name == "megatron" else inside  # in a checkpoint of a run
    for folder in (inside, beside):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"{source} has no {DESCRIPTION}/config.json: name the model's Hugging Face directory with --hf-path"
    )


def _stored_dtype(tensor: CheckpointTensor, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype of a Megatron tensor. Raises InputError if the HF tensors that it fuses have several."""
    names = {run.hf_name for run in tensor.runs}
    dtype = _only(dtypes[name] for name in names)
    if dtype is None:
        raise InputError(
            f"{', '.join(sorted(names))} become one tensor, but have different dtypes: choose one with --dtype"
        )
    return dtype


def _only(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The one dtype; None if there are several."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else None


def _piece_bytes(workers: int) -> int:
    return min(PIECE_BYTES, BUFFER_BYTES // (PIECES_A_WORKER * workers))


def _read_cast(weights: HfWeights, name: str, first_row: int, out: torch.Tensor, scratch: Scratch) -> None:
    """Fills `out` with rows of a tensor, in the dtype of `out`."""
    if weights.dtype(name) == out.dtype:
        weights.read_rows(name, first_row, out)
        return
    rows = scratch.take(tuple(out.shape), weights.dtype(name))
    weights.read_rows(name, first_row, rows)
    cast_into(name, rows, out)


class _Hashes:
    """Hashes of HF tensors whose rows arrive from top to bottom; a tensor's all in one thread."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> None:
        self._shapes, self._dtypes = shapes, dtypes
        self._running: dict[str, tuple[blake3, int]] = {}  # with the bytes so far
        self._finished: dict[str, TensorHash] = {}

    def update(self, name: str, rows: torch.Tensor) -> None:
        shape, dtype = self._shapes[name], self._dtypes[name]
        running, count = self._running.pop(name, (blake3(), 0))
        running.update(bytes_of(rows))
        count += rows.nbytes
        if name in self._finished or count > math.prod(shape) * dtype.itemsize:
            raise RunError(f"tensor {name!r}: more bytes were converted than it has")
        if count == math.prod(shape) * dtype.itemsize:
            self._finished[name] = TensorHash(str(dtype).removeprefix("torch."), shape, running.hexdigest())
        else:
            self._running[name] = (running, count)

    def finish(self) -> dict[str, TensorHash]:
        """Raises RunError unless every byte of every tensor has passed exactly once."""
        for name in self._shapes:
            if name not in self._finished:
                raise RunError(f"tensor {name!r} was not converted as a whole")
        return self._finished


class _Share:
    """What one worker takes from the common pile: place after place, until it is empty or another worker has failed."""

    def __init__(self, pile: "_Pile", worker: int) -> None:
        self._pile, self.worker = pile, worker

    def __iter__(self) -> Iterator[int]:
        return self._pile

    def done(self, nbytes: int) -> None:
        """Counts what has been written, and ends the work of this worker if another one has failed."""
        self._pile.count(nbytes)


class _Pile:
    """Places to be worked on, the largest first, so that no worker is left alone with a large one in the end."""

    def __init__(self, sizes: Sequence[int], progress: Progress) -> None:
        self._lock = threading.Lock()
        self._places = iter(sorted(range(len(sizes)), key=lambda place: -sizes[place]))
        self._done, self._total, self._progress = 0, sum(sizes), progress
        self.stopped = False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._lock:
            return next(self._places)

    def count(self, nbytes: int) -> None:
        if self.stopped:
            raise _Stopped
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


class _Stopped(Exception):
    """Another worker has failed, or the user has had enough."""


def _share_out(sizes: Sequence[int], workers: int, work: Callable[[_Share], None], progress: Progress) -> None:
    """Runs `work` in several threads, and raises the first error of any."""
    pile = _Pile(sizes, progress)
    with ThreadPoolExecutor(workers, "convert") as pool:
        futures = [pool.submit(work, _Share(pile, worker)) for worker in range(min(workers, len(sizes)))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pile.stopped = True
            wait(futures)
    errors = [e for e in (f.exception() for f in futures) if e is not None and not isinstance(e, _Stopped)]
    if errors:
        raise errors[0]
