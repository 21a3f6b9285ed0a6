"""The ranks of an actor that holds the tensors of a model, in threads of this process, for tests of weight syncs."""

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.meeting import serve_store
from megatron_coreward.weights.senders import LocalBlock, Sender, open_sender
from megatron_coreward.weights.spec import TransferSpec, Transport

_numbers = itertools.count()


def spec_of(
    transport: Transport,
    actor: ActorLayout,
    engines: EngineLayout,
    port: int,
    *,
    bucket_bytes: int = 20_000,
    dtype: str = "float32",
    timeout_s: float = 30.0,
    checksums: bool = True,
) -> TransferSpec:
    """A spec with a name of its own."""
    name = f"test-{os.getpid()}-{next(_numbers)}"
    spec = TransferSpec(transport, name, actor, engines, dtype, bucket_bytes, timeout_s, checksums)
    return spec.at("127.0.0.1", port)


def blocks_of(
    actor: ActorLayout, rank: int, arch: Architecture, tensors: Mapping[str, torch.Tensor]
) -> list[LocalBlock]:
    """What a rank holds of the tensors; they may change between two weight syncs."""
    return [
        LocalBlock(name, index, lambda name=name, index=index: tensors[name][index])
        for name, bounds in actor.held(rank, arch)
        for index in [tuple(slice(*cut) for cut in bounds)]
    ]


class Ranks:
    """All ranks of an actor. `tensors` is what they hold; put others there for another weight sync."""

    def __init__(
        self,
        arch: Architecture,
        tensors: Mapping[str, torch.Tensor],
        transport: Transport,
        actor: ActorLayout,
        engines: EngineLayout,
        **options: int | float | str | bool,
    ) -> None:
        self.arch, self.tensors = arch, dict(tensors)
        self.store = serve_store("127.0.0.1", 60)
        self.spec = spec_of(transport, actor, engines, self.store.port, **options)  # type: ignore[arg-type]
        self._pool = ThreadPoolExecutor(actor.world_size)
        self.senders: list[Sender] = list(self._pool.map(self._open, range(actor.world_size)))

    def _open(self, rank: int) -> Sender:
        blocks = blocks_of(self.spec.actor, rank, self.arch, self.tensors)
        return open_sender(self.spec, self.arch, rank, {"policy": blocks}, torch.device("cpu"))

    def start(self, version: int, send: Callable[[Sender, int], None] | None = None) -> list["Future[None]"]:
        """Lets all ranks send. `send` does it in another way."""
        if send is not None:
            return [self._pool.submit(send, sender, version) for sender in self.senders]
        return [self._pool.submit(sender.send, "policy", version) for sender in self.senders]

    def close(self) -> None:
        for sender in self.senders:
            sender.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
