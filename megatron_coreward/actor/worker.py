"""An actor rank in a process of its own: the shell that the driver makes a Ray actor of."""

from typing import TYPE_CHECKING, Any

from megatron_coreward.actor.setup import ActorSetup
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog
from megatron_coreward.weights.ports import free_port

if TYPE_CHECKING:
    from megatron_coreward.actor.actor import MegatronActor


class ActorWorker(LoggedWorker):
    """`ray.remote(ActorWorker)`: carries out the methods of `MegatronActor`, with arguments and results by value.

    The sequences of a micro-batch plan arrive with it, so that a rank receives no more than its own.
    """

    def __init__(self, log: ProcessLog | None = None) -> None:
        super().__init__(log)
        self._actor: MegatronActor | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free on it, where the ranks can meet."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def start(self, setup: ActorSetup, rank: int, address: str, port: int) -> tuple[int, bool]:
        """Builds the rank; returns its data-parallel rank and whether results are taken from it."""
        from megatron_coreward.actor.actor import MegatronActor

        self._actor = MegatronActor(setup, rank, address, port)
        return self._actor.ranks.dp_rank, self._actor.is_output_rank

    def run(self, method: str, *arguments: Any) -> Any:
        """A method of the rank."""
        if self._actor is None:
            raise RuntimeError("this actor rank was not started")
        return getattr(self._actor, method)(*arguments)

    def shutdown(self) -> None:
        if self._actor is not None:
            self._actor.shutdown()
            self._actor = None
