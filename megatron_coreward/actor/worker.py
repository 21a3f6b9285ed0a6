"""An actor rank in a process of its own: the shell that the driver makes a Ray actor of."""

import gc
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog
from megatron_coreward.weights.layouts import ActorLayout
from megatron_coreward.weights.ports import free_port

if TYPE_CHECKING:
    from megatron_coreward.actor.actor import MegatronActor
    from megatron_coreward.actor.relay import Relay


class ActorWorker(LoggedWorker):
    """`ray.remote(ActorWorker)`: carries out the methods of `MegatronActor`, with arguments and results by value.

    The driver calls the leader of each replica (`actor.relay`). The sequences of a micro-batch plan arrive with it, so
    that a replica receives no more than its own.
    """

    UNWATCHED = frozenset({"follow"})  # what it carries out is watched, command by command

    def __init__(self, log: ProcessLog | None = None) -> None:
        super().__init__(log)
        self._actor: MegatronActor | None = None
        self._relay: Relay | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free on it, where the ranks can meet."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def start(self, setup: ActorSetup, rank: int, address: str, port: int) -> tuple[int, bool]:
        """Builds the rank; returns its data-parallel rank and whether results are taken from it."""
        from torch import distributed

        from megatron_coreward.actor.actor import MegatronActor
        from megatron_coreward.actor.relay import Relay

        self._actor = MegatronActor(setup, rank, address, port)
        store = distributed.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
        self._relay = Relay(ActorLayout.of(setup.settings), rank, store)
        gc.collect()
        gc.freeze()  # the model stays: nobody need look at it again
        gc.disable()  # a rank that collects by itself lets all others wait; after an update all of them do
        return self._actor.ranks.dp_rank, self._actor.is_output_rank

    def lead(self, method: str, wanted: Collection[int] | None, *arguments: Any) -> dict[int, Any]:
        """Lets all ranks of this replica carry out a method; its leader is called. Returns the wanted results by rank.

        Args:
            wanted: ranks whose results are wanted; None: all.
        """
        assert self._relay is not None
        return self._relay.lead(method, arguments, wanted, self._run)

    def follow(self) -> None:
        """Carries out what the leader of this replica passes on. The call returns when the leader leaves; until then
        it stands for this process's life."""
        assert self._relay is not None
        self._relay.follow(self._run)

    def _run(self, method: str, *arguments: Any) -> Any:
        assert self._actor is not None
        with self._watching():
            result = getattr(self._actor, method)(*arguments)
            if method == "update":
                gc.collect()
            return result

    def shutdown(self) -> None:
        if self._relay is not None and self._relay.leads:
            self._relay.dismiss()
        if self._actor is not None:
            self._actor.shutdown()
            self._actor = None
