"""Where the parties of a weight sync find each other, and learn that one of them has given up.

Rank 0 of the actor serves a store for the length of a run; everybody else is its client, under the name of the spec. A
party that fails says so in the store, and those that wait for it look there: nobody waits for one that is gone until a
time limit ends the wait.
"""

import contextlib
import datetime
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import distributed

from megatron_coreward.errors import RunError
from megatron_coreward.weights.spec import TransferSpec

dist: Any = distributed  # its process groups and stores are not in its typed interface
LOOK_EVERY_S = 0.25  # for a party that has given up
_GIVEN_UP = "given up"


def own_address(address: str, port: int) -> str:
    """This host's address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((address, port))
        return str(way.getsockname()[0])


def serve_store(address: str, timeout_s: float) -> Any:
    """The store at which everybody meets; its port is free and in `.port`. It lives as long as the object."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def give_up(spec: TransferSpec, reason: str) -> None:
    """Tells all parties of a spec that its transfers are over, from a process that is none of them."""
    with contextlib.suppress(Exception):  # the store has gone with rank 0: everybody notices that
        Meeting(replace(spec, timeout_s=10.0)).give_up(reason)


class Meeting:
    """One party's view of a spec's store."""

    def __init__(self, spec: TransferSpec) -> None:
        """Raises RunError if the store cannot be reached."""
        self._spec, self.timeout_s = spec, spec.timeout_s
        self.store = self.new_client()

    def new_client(self) -> Any:
        """A connection to the store for one more thread: whoever waits in one keeps all others from it.

        Raises:
            RunError: the store cannot be reached.
        """
        spec, timeout = self._spec, datetime.timedelta(seconds=self.timeout_s)
        try:
            store = dist.TCPStore(spec.address, spec.port, is_master=False, timeout=timeout)
        except RuntimeError as error:  # torch's DistNetworkError among them
            raise RunError(
                f"weight sync: rank 0 of the actor cannot be reached at {spec.address}:{spec.port} ({error})"
            ) from error
        return dist.PrefixStore(spec.name, store)

    def give_up(self, reason: str) -> None:
        """Tells everybody that this spec's transfers are over."""
        with contextlib.suppress(Exception):  # the store may have gone with rank 0; then everybody notices that
            self.store.set(_GIVEN_UP, reason)

    def check(self) -> None:
        """Raises RunError if a party has given up, or if the store has gone with rank 0."""
        try:
            if not self.store.check([_GIVEN_UP]):
                return
            reason = self.store.get(_GIVEN_UP).decode()
        except RuntimeError as error:  # torch's DistStoreError among them
            raise _gone(error) from error
        raise RunError(f"weight sync: given up, because of another process: {reason}")

    def _is_there(self, key: str) -> bool:
        """Raises as `check`."""
        self.check()
        try:
            return bool(self.store.check([key]))
        except RuntimeError as error:
            raise _gone(error) from error

    def wait_until(self, ready: Callable[[], bool], awaited: str) -> None:
        """Returns once `ready()` is true.

        Raises:
            RunError: a party has given up, or it takes longer than the spec's limit.
        """
        begin = looked = time.monotonic()
        pause = 0.0
        while not ready():
            now = time.monotonic()
            if now - looked > LOOK_EVERY_S:
                looked = now
                self.check()
            if now - begin > self.timeout_s:
                raise self.late(awaited)
            time.sleep(pause)  # first only lets others run
            pause = min(pause + 1e-5, 2e-4)

    def late(self, awaited: str) -> RunError:
        """What to raise when the spec's limit has passed."""
        return RunError(f"weight sync: {awaited} took longer than {self.timeout_s:g} s (sync.timeout_s)")

    def everybody(self, occasion: str, size: int) -> None:
        """Returns once `size` parties have come to an occasion, each of them once.

        There is no limit: some may still be busy with what they were asked before, engines with rollouts, say. The
        driver, who asked all of them, knows how long that may take, and gives up for them.

        Raises:
            RunError: a party has given up.
        """
        complete = f"{occasion}/complete"
        try:
            if self.store.add(f"{occasion}/arrived", 1) == size:
                self.store.set(complete, "")
        except RuntimeError as error:
            raise _gone(error) from error
        begin = time.monotonic()
        while not self._is_there(complete):
            waited = time.monotonic() - begin
            time.sleep(min(LOOK_EVERY_S, 1e-3 + waited / 10))  # thousands may ask


def _gone(error: Exception) -> RunError:
    return RunError(f"weight sync: rank 0 of the actor cannot be reached any more ({error})")
