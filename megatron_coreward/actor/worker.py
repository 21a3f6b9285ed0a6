"""An actor rank in a process of its own: the shell that the trainer makes a Ray actor of."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_coreward.actor.packing import MicroBatchPlan
from megatron_coreward.actor.setup import ActorSetup, Weights
from megatron_coreward.telemetry.memory import DeviceMemory
from megatron_coreward.telemetry.process_log import LoggedWorker, ProcessLog
from megatron_coreward.types import Role, Sequences, TokenStats, TrainBatch
from megatron_coreward.weights.ports import free_port
from megatron_coreward.weights.spec import TransferSpec

if TYPE_CHECKING:
    from megatron_coreward.actor.actor import MegatronActor
    from megatron_coreward.actor.saving import FileHashes


class ActorWorker(LoggedWorker):
    """`ray.remote(ActorWorker)`; the methods are those of `MegatronActor`, with arguments and results by value.

    A share's sequences arrive with it, so that a rank receives no more than its own.
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

    @property
    def _rank(self) -> "MegatronActor":
        if self._actor is None:
            raise RuntimeError("this actor rank was not started")
        return self._actor

    def token_stats(
        self, sequences: Sequences, micro_batches: MicroBatchPlan, weights: Weights, temperature: float
    ) -> TokenStats | None:
        return self._rank.token_stats(sequences, micro_batches, weights, temperature)

    def update(self, batch: TrainBatch, micro_batches: MicroBatchPlan) -> dict[str, float] | None:
        return self._rank.update(batch, micro_batches)

    def update_ema_teacher(self, decay: float) -> None:
        self._rank.update_ema_teacher(decay)

    def describe(self) -> dict[str, str]:
        return self._rank.describe()

    def offload(self) -> DeviceMemory | None:
        return self._rank.offload()

    def onload(self) -> DeviceMemory | None:
        return self._rank.onload()

    def open_sender(self, spec: TransferSpec) -> TransferSpec:
        return self._rank.open_sender(spec)

    def send_weights(self, role: Role, version: int) -> None:
        self._rank.send_weights(role, version)

    def export_hf(self, weights: Weights, target: Path) -> None:
        self._rank.export_hf(weights, target)

    def save(self, target: Path) -> None:
        self._rank.save(target)

    def begin_save(self, target: Path) -> None:
        self._rank.begin_save(target)

    def save_written(self) -> bool:
        return self._rank.save_written()

    def finish_save(self) -> "FileHashes":
        return self._rank.finish_save()

    def load(self, source: Path) -> None:
        self._rank.load(source)

    def shutdown(self) -> None:
        if self._actor is not None:
            self._actor.shutdown()
            self._actor = None
