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

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.rollout.setup import EngineSetup
from megatron_coreward.rollout.worker import RolloutWorker
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.spec import Transport
from tests.weights.ranks import Ranks

START_TIMEOUT_S = 240  # on a machine that is busy with other things
CALL_TIMEOUT_S = 60
TWO_RANKS, ONE_ENGINE = ActorLayout(tensor_parallel=2), EngineLayout()

_worker: RolloutWorker


def _start(model_path: Path, settings: dict[str, Any]) -> int:
    global _worker
    _worker = RolloutWorker(EngineSetup(model_path, **settings))
    return os.getpid()


def _call(method: str, args: Sequence[Any]) -> Any:
    return _worker.shutdown() if method == "shutdown" else _worker.run(method, *args)


def _in_workers(function: Callable[..., Any], args: Sequence[Any]) -> list[Any]:
    return _worker._engine._llm.collective_rpc(function, args=tuple(args))  # type: ignore[no-any-return]


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

    def in_workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The function in every vLLM worker, with the worker before its arguments."""
        return self._pool.submit(_in_workers, function, args).result(timeout=CALL_TIMEOUT_S)

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


def sync(
    engine: Any,
    checkpoint: Path,
    version: int,
    *,
    transport: Transport = "shared_memory",
    actor: ActorLayout = TWO_RANKS,
    engines: EngineLayout = ONE_ENGINE,
    expected: int | None = None,
    lacking: str | None = None,
) -> None:
    """Sends the tensors of a checkpoint to an engine, from ranks in threads of this process.

    Args:
        expected: the version that the engine waits for, if it is another one.
        lacking: a tensor of which the ranks have no values.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    if lacking is not None:
        tensors[lacking] = tensors[lacking].int()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    ranks = Ranks(read_architecture(checkpoint), tensors, transport, actor, engines, dtype=dtype)
    try:
        sending = ranks.start(version)
        engine.receive_weights(ranks.spec.to_json(), 0, version if expected is None else expected)
        for future in sending:
            future.result(timeout=60)
    finally:
        ranks.close()
