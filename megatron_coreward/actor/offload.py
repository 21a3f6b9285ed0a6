"""Parts of an actor's state that give their device memory away for a while. Their values wait in host memory.

The storages are emptied and filled again; tensors and their views stay the objects that they are, so nobody who holds
one has to be notified. The host's copies are page-locked if there is a GPU, and are kept for the next time.

Invariants (tests/actor/test_offload.py):
  1. A part that comes back has the bits with which it left.
  2. While it is away it holds no device memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

Tensors = Callable[[], Iterable[torch.Tensor]]


@dataclass(slots=True)
class Part:
    """Tensors that go and come together; no two of them share a storage with anything that stays."""

    tensors: Tensors
    rests_away: bool = False  # comes for the calls that need it only
    away: list[tuple[torch.UntypedStorage, torch.Tensor]] = field(default_factory=list)  # with the values on the host
    host: dict[int, torch.Tensor] = field(default_factory=dict)  # memory to wait in, by the storage's identity


class Offloaded:
    """The parts of one process's state, by name, and which of them are away."""

    def __init__(self, parts: dict[str, Part]) -> None:
        self._parts = parts

    def leave(self, *names: str) -> None:
        """Sends parts away; those that are away stay so."""
        leaving: list[torch.UntypedStorage] = []
        for part in (self._parts[name] for name in names if name in self._parts):
            if part.away:
                continue
            for tensor in part.tensors():
                storage = tensor.untyped_storage()
                if storage.nbytes() == 0:
                    continue
                host = part.host.get(storage._cdata)
                if host is None or len(host) != storage.nbytes():
                    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
                    part.host[storage._cdata] = host
                host.copy_(_bytes(storage), non_blocking=True)
                part.away.append((storage, host))
                leaving.append(storage)
        _wait()
        for storage in leaving:
            storage.resize_(0)
        if leaving and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def come(self, *names: str) -> None:
        """Brings parts back; those that are here stay so."""
        for part in (self._parts[name] for name in names if name in self._parts):
            for storage, host in part.away:
                storage.resize_(len(host))
                _bytes(storage).copy_(host, non_blocking=True)
            part.away = []
        _wait()

    def settle(self) -> None:
        """Sends away what rests away, and brings the other parts."""
        self.leave(*(name for name, part in self._parts.items() if part.rests_away))
        self.come(*(name for name, part in self._parts.items() if not part.rests_away))

    @contextmanager
    def at_hand(self, *names: str) -> Iterator[None]:
        """The parts, on the device, for the length of a call."""
        absent = [name for name in names if name in self._parts and self._parts[name].away]
        self.come(*absent)
        try:
            yield
        finally:
            self.leave(*absent)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory(cached: bool = False) -> int | None:
    """Bytes of this process's GPU that nobody holds; None without one.

    Args:
        cached: give back first what torch keeps for its next tensors.
    """
    if cached and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
