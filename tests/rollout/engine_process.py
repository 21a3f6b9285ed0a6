"""A rollout engine in a process of its own, as in a run, so that vLLM's global settings touch no other test."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from megatron_coreward.rollout.engine import Sample
from megatron_coreward.rollout.packed import PackedSamples
from megatron_coreward.rollout.worker import RolloutWorker

START_TIMEOUT_S = 240  # on a machine that is busy with other things
CALL_TIMEOUT_S = 60

_worker: RolloutWorker


def _start(model_path: Path, settings: dict[str, Any]) -> int:
    global _worker
    _worker = RolloutWorker(model_path, **settings)
    return os.getpid()


def _call(method: str, args: Sequence[Any]) -> Any:
    return getattr(_worker, method)(*args)


class EngineProcess:
    """Calls of `RolloutWorker`'s methods, carried out in the other process."""

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

    def sample(self, *args: Any) -> list[list[Sample]]:
        """As the trainer has them, which unpacks what comes."""
        packed: PackedSamples = self._pool.submit(_call, "sample", args).result(timeout=CALL_TIMEOUT_S)
        return packed.unpack()

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
