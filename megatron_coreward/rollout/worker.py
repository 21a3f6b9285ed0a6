"""A rollout engine in a process of its own: the shell that the trainer makes a Ray actor of."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from megatron_coreward.rollout.engine import RolloutEngine, SamplingRequest
from megatron_coreward.rollout.packed import PackedSamples, pack
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog
from megatron_coreward.types import FloatArray, IntArray

Result = TypeVar("Result")
Asked = ParamSpec("Asked")


def _ends_with_its_processes(
    method: "Callable[Concatenate[RolloutWorker, Asked], Result]",
) -> "Callable[Concatenate[RolloutWorker, Asked], Result]":
    """A call that fails because a process of the engine has died ends this one: it is not the request that is wrong."""

    @wraps(method)
    def call(self: "RolloutWorker", /, *args: Asked.args, **kwargs: Asked.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except Exception:
            if self._engine.lost_a_process:
                os._exit(1)
            raise

    return call


class RolloutWorker(LoggedWorker):
    """`ray.remote(RolloutWorker)`; the methods are those of `RolloutEngine`, with arguments and results by value."""

    def __init__(self, model_path: Path, *, log: ProcessLog | None = None, **settings: Any) -> None:
        """Starts the engine; the arguments are those of `RolloutEngine`. Where a process of it dies, this one does too:
        the trainer hears of it, and may start the engine anew.
        """
        super().__init__(log)
        with self._watching():
            self._engine = RolloutEngine(model_path, on_worker_death=lambda: os._exit(1), **settings)

    def ready(self) -> bool:
        """True; a call that returns once the engine has started."""
        return True

    def version(self) -> int | None:
        return self._engine.version

    @_ends_with_its_processes
    def sample(self, requests: Sequence[SamplingRequest], expected_version: int) -> PackedSamples:
        return pack(self._engine.sample(requests, expected_version))

    @_ends_with_its_processes
    def score(self, token_ids: Sequence[int] | IntArray) -> FloatArray:
        return self._engine.score(token_ids)

    @_ends_with_its_processes
    def receive_weights(self, init_info: Mapping[str, Any], version: int) -> None:
        self._engine.receive_weights(init_info, version)

    @_ends_with_its_processes
    def sleep(self) -> DeviceMemory | None:
        return self._engine.sleep()

    @_ends_with_its_processes
    def wake(self, part: Literal["weights", "kv_cache"] | None = None) -> DeviceMemory | None:
        return self._engine.wake(part)

    def shutdown(self) -> None:
        self._engine.shutdown()
