"""What the tests of `actor.relay` run on ranks."""

from typing import Any

import torch.distributed as dist

from megatron_coreward.actor.relay import PROGRESS, Relay
from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.meeting import Meeting
from tests.actor.ranks import free_port
from tests.weights.ranks import spec_of

LAYOUT = ActorLayout(tensor_parallel=1, pipeline_parallel=2, data_parallel=2)


def commands(rank: int, num_ranks: int, port: int) -> dict[str, Any]:
    """Each rank's record of a few commands, one of which fails on rank 0."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    if rank == 0:  # as Megatron does for the stages that hold the embedding: ranks have different numbers of groups
        dist.new_group([0], use_local_synchronization=True)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    relay = Relay(LAYOUT, rank, store)
    done: list[Any] = []

    def run(method: str, *arguments: Any) -> Any:
        done.append((method, *arguments))
        if method == "send_weights" and rank == 0:
            raise RunError("rank 0 gave up")
        if method == "open_sender" and rank == 0:
            Meeting(spec_of("gloo", ActorLayout(), EngineLayout(), free_port(), timeout_s=1.0))  # nobody serves it
        return (method, rank)

    found: list[Any] = []
    if relay.leads:
        found.append(relay.lead("offload", (), None, run))
        found.append(relay.lead("token_stats", ("part", rank), (relay.leader,), run))
        for method in ("open_sender", "send_weights"):
            try:
                relay.lead(method, (), (), run)
            except RunError as error:
                found.append(str(error))
        found.append(relay.lead("save", ("folder",), (), run))
        relay.dismiss()
    else:
        relay.follow(run)
    dist.barrier()
    progress = int(store.get(f"{PROGRESS}/{rank}"))
    dist.barrier()
    dist.destroy_process_group()
    return {"done": done, "found": found, "progress": progress}


def failing(rank: int, num_ranks: int, port: int) -> str:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    relay = Relay(ActorLayout(pipeline_parallel=2), rank, dist.TCPStore("127.0.0.1", port, is_master=False))

    def run(method: str, *arguments: Any) -> None:
        if rank == 0:
            raise FloatingPointError("the gradient is not finite")

    if not relay.leads:
        try:
            relay.follow(run)
        except FloatingPointError as error:
            return f"ended with: {error}"
        return "ended"
    try:
        relay.lead("update", (), (1,), run)
    except RuntimeError:  # rank 0 left its loop, and in the end its process
        return "could not collect"
    return "collected"
