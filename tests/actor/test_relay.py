"""Commands reach every rank of a replica through its leader, and a rank that fails is heard of."""

from typing import Any

import pytest
import torch.distributed as dist

from megatron_coreward.actor.relay import PROGRESS, Relay, replica_of
from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout
from tests.actor.ranks import free_port, run_ranks

LAYOUT = ActorLayout(tensor_parallel=1, pipeline_parallel=2, data_parallel=2)


def test_a_replica_is_a_copy_of_the_model_and_a_rank_that_has_results_leads_it() -> None:
    layout = ActorLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=2, context_parallel=2)
    replicas = [replica_of(layout, dp_rank) for dp_rank in range(2)]
    assert sorted(rank for replica in replicas for rank in replica) == list(range(16))
    for dp_rank, (leader, *others) in enumerate(replicas):
        places = [layout.place(rank) for rank in (leader, *others)]
        assert {place.dp for place in places} == {dp_rank}
        assert (places[0].pp, places[0].tp, places[0].cp) == (1, 0, 0)


def commands(rank: int, num_ranks: int, port: int) -> dict[str, Any]:
    """Each rank's record of a few commands, one of which fails on rank 0."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_ranks)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    relay = Relay(LAYOUT, rank, store)
    done: list[Any] = []

    def run(method: str, *arguments: Any) -> Any:
        done.append((method, *arguments))
        if method == "send_weights" and rank == 0:
            raise RunError("rank 0 gave up")
        return (method, rank)

    found: list[Any] = []
    if relay.leads:
        found.append(relay.lead("offload", (), None, run))
        found.append(relay.lead("token_stats", ("part", rank), (relay.leader,), run))
        try:
            relay.lead("send_weights", (), (), run)
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


@pytest.mark.timeout(200)
def test_every_rank_carries_out_every_command_once_and_the_wanted_answers_come_back() -> None:
    # Ranks 0 and 2 are the stages of the first replica, 1 and 3 those of the second; the last stages lead.
    ranks = run_ranks(4, commands, free_port())
    for replica in ((2, 0), (3, 1)):
        leader = replica[0]
        expected = [("offload",), ("token_stats", "part", leader), ("send_weights",), ("save", "folder")]
        for rank in replica:
            assert ranks[rank]["done"] == expected
            assert ranks[rank]["progress"] == 4
        everybody = {rank: ("offload", rank) for rank in replica}
        assert ranks[leader]["found"][:2] == [everybody, {leader: ("token_stats", leader)}]
    # The error from which a run can go on came to the leader, and the command after it was carried out.
    assert ranks[2]["found"][2:] == ["rank 0 gave up", {}]
    assert ranks[3]["found"][2:] == [{}]


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


@pytest.mark.timeout(200)
def test_a_rank_that_fails_ends_its_loop_with_the_error() -> None:
    """Its outstanding call brings it to the driver, whatever the leader waits for."""
    assert run_ranks(2, failing, free_port()) == [
        "ended with: the gradient is not finite",
        "could not collect",
    ]
