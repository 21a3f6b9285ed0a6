"""A rollout engine in a process of its own, as in a run, so that vLLM's global settings touch no other test."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.weights.buckets import TensorMeta, check_tiling
from megatron_coreward.weights.send import BlockHash, LocalBlock, SharedMemorySender

START_TIMEOUT_S = 240  # on a machine that is busy with other things
CALL_TIMEOUT_S = 60
BUCKET_BYTES = 20_000  # less than a layer: fused weights (q, k and v; gate and up) straddle buckets

_worker: RolloutWorker


def _start(model_path: Path, settings: dict[str, Any]) -> int:
    global _worker
    _worker = RolloutWorker(EngineSetup(model_path, **settings))
    return os.getpid()


def _call(method: str, args: Sequence[Any]) -> Any:
    return _worker.shutdown() if method == "shutdown" else _worker.run(method, *args)


def _version() -> int | None:
    return _worker._engine.version


class EngineProcess:
    """Calls of `RolloutEngine`'s methods, carried out in the other process."""

    def __init__(self, model_path: Path, **settings: Any) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            self._pid: int = self._pool.submit(_start, model_path, settings).result(timeout=START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._pool.submit(_call, method, args).result(timeout=CALL_TIMEOUT_S)

    @property
    def pid(self) -> int:
        return self._pid

    def version(self) -> int | None:
        return self._pool.submit(_version).result(timeout=CALL_TIMEOUT_S)

    def close(self) -> None:
        try:
            self.shutdown()
        finally:
            self.kill()

    def kill(self) -> None:
        for pid in list(self._pool._processes or ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)


def two_ranks(checkpoint: Path, dtype: str = "float32") -> tuple[list[TensorMeta], list[list[LocalBlock]]]:
    """The tensors of a checkpoint, split over two ranks as tensor parallelism splits them."""
    tensors = load_file(checkpoint / "model.safetensors")
    metas = [TensorMeta(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items()]
    ranks: list[list[LocalBlock]] = [[], []]
    for i, (name, tensor) in enumerate(tensors.items()):
        whole = (slice(None),) * tensor.dim()
        if tensor.dim() == 1:
            ranks[i % 2].append(LocalBlock(name, whole, lambda t=tensor: t))
            continue
        dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
        middle = (tensor.shape[dim] + 1) // 2
        for rank, cut in enumerate((slice(0, middle), slice(middle, None))):
            index = (*whole[:dim], cut, *whole[dim + 1 :])
            ranks[rank].append(LocalBlock(name, index, lambda t=tensor, at=index: t[at]))
    check_tiling(metas, [(block.name, block.index) for rank in ranks for block in rank])
    return metas, ranks


def send(
    engine: Any,
    metas: Sequence[TensorMeta],
    ranks: Sequence[Sequence[LocalBlock]],
    version: int,
    bucket_bytes: int = BUCKET_BYTES,
) -> int:
    """One update of the engine's weights, as the trainer conducts it; returns the number of buckets."""
    sent = {meta.name for meta in metas}
    segment = f"test-{os.getpid()}"
    senders = [
        SharedMemorySender([b for b in blocks if b.name in sent], metas, bucket_bytes, segment, rank, len(ranks))
        for rank, blocks in enumerate(ranks)
    ]
    try:
        engine.start_update(senders[0].init_info)
        for bucket in range(senders[0].num_buckets):
            hashes: list[BlockHash] = []
            for sender in senders:
                hashes += sender.write(bucket, version, hashes=True)
            engine.load_bucket(bucket, version, hashes)
        engine.finish_update(version)
        return senders[0].num_buckets
    finally:
        for sender in senders:
            sender.close()
