"""Writing a distributed checkpoint on a thread of each rank, while training goes on.

Plan, files and metadata are Megatron's. Its own asynchronous save forks writer processes out of every rank and collects
their results through a manager process. A rank has gloo, Ray and OpenMP threads: a fork can inherit their locks and
hang, and a rank that is killed leaves the manager behind. So Megatron's writing function runs on a thread here (most of
its time goes to writes, which let the interpreter go on), and no process is started at all.

Invariants (tests/actor/test_saving.py):
  1. What is written are the values of the moment at which `begin_save` returned, whatever training does meanwhile.
  2. Saving starts no process.
  3. A write that fails on one rank raises its error on every rank.
"""

import inspect
import os
import queue
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

# From 0.19 on, megatron-core takes the writer of NVIDIA's resiliency extension unless it is told to take its own.
_MEGATRONS_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)

FileHashes = dict[str, tuple[int, str]]  # file name -> bytes, blake3


class Saving:
    """A checkpoint under way. Every rank begins it, and every rank finishes it."""

    def __init__(self, state: dict[str, Any], live: Iterable[torch.Tensor], target: Path) -> None:
        """Takes a snapshot of the state and starts to write it.

        Args:
            state: sharded state dict of this rank.
            live: tensors that training writes in place: what shares their memory is copied first.
            target: directory that exists and is empty.
        """
        # megatron-core 0.16.1: the writer takes its queue from here, and starts a manager process if there is none.
        filesystem_async._results_queue = queue.SimpleQueue()
        self._request = dist_checkpointing.save(state, str(target), async_sharded_save=True, **_MEGATRONS_WRITER)
        self._hashes: FileHashes = {}
        self._error: tuple[int | None, str] | None = None  # the system's number, and the text
        self._thread: threading.Thread | None = None
        if self._request.async_fn is None:  # nothing to write on this rank
            return
        (transforms, _), (_, buckets, results) = self._request.async_fn.args, self._request.async_fn_args
        if self._request.preload_fn is not None:
            on_host = self._request.preload_fn()
            for _, _, (_, tensors) in buckets:  # the request holds these lists, and with them device memory, to the end
                tensors.clear()
            buckets = on_host
        memory = {tensor.untyped_storage().data_ptr() for tensor in live}
        own = [_own_copies(bucket, memory) for bucket in buckets]
        self._thread = threading.Thread(target=self._write, args=(transforms, own, results), name="checkpoint")
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank's part is written, or has failed: `finish` need not wait for it."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> FileHashes:
        """Waits for all ranks, then completes the checkpoint. Returns the hashes of the files that this rank wrote.

        Raises:
            OSError: the first error of any rank; the checkpoint is not complete.
        """
        if self._thread is not None:
            self._thread.join()
        errors: list[tuple[int | None, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, self._error)
        for rank, error in enumerate(errors):
            if error is not None:
                number, what = error
                text = f"actor rank {rank}: {what}"
                raise OSError(text) if number is None else OSError(number, text)
        for complete in self._request.finalize_fns:
            complete()
        return self._hashes

    def _write(self, transforms: Any, buckets: list[Any], results: Any) -> None:
        try:
            written: dict[int, Any] = {}
            for number, bucket in enumerate(buckets):
                replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
                filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                    transforms, number, bucket, replies, _Uncounted(), use_fsync=True
                )
                _, outcome = replies.get()
                if isinstance(outcome, Exception):
                    raise outcome
                written[number] = outcome
                path = Path(bucket[0])
                self._hashes[path.name] = (os.path.getsize(path), hash_file(path))
            results.put(written)
        except Exception as error:
            self._error = getattr(error, "errno", None), f"{type(error).__name__}: {error}"


def hash_file(path: Path) -> str:
    """blake3 of a file's bytes."""
    return str(blake3().update_mmap(path).hexdigest())


class _Uncounted:
    """Stands for the queue by which Megatron counts its writer processes."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _own_copies(bucket: Any, memory: set[int]) -> Any:
    """The bucket with copies of the tensors that share memory with training."""
    path, name, (objects, tensors) = bucket
    copied = [(item, t.clone() if t.untyped_storage().data_ptr() in memory else t) for item, t in tensors]
    return path, name, (objects, copied)
