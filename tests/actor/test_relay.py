"""Commands reach every rank of a replica through its leader, and a rank that fails is heard of."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from megatron_coreward.actor.relay import Relay, replica_of
from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout
from tests.actor.ranks import free_port, run_ranks
from tests.actor.relay_on_ranks import commands, failing


def test_a_replica_is_a_copy_of_the_model_and_a_rank_that_has_results_leads_it() -> None:
    layout = ActorLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=2, context_parallel=2)
    replicas = [replica_of(layout, dp_rank) for dp_rank in range(2)]
    assert sorted(rank for replica in replicas for rank in replica) == list(range(16))
    for dp_rank, (leader, *others) in enumerate(replicas):
        places = [layout.place(rank) for rank in (leader, *others)]
        assert {place.dp for place in places} == {dp_rank}
        assert (places[0].pp, places[0].tp, places[0].cp) == (1, 0, 0)


@pytest.mark.timeout(200)
@pytest.mark.ranks
def test_every_rank_carries_out_every_command_once_and_the_wanted_answers_come_back() -> None:
    # Ranks 0 and 2 are the stages of the first replica, 1 and 3 those of the second; the last stages lead.
    ranks = run_ranks(4, commands, 4, free_port())
    for replica in ((2, 0), (3, 1)):
        leader = replica[0]
        expected: list[tuple[object, ...]] = [("offload",), ("token_stats", "part", leader)]
        expected += [("open_sender",), ("send_weights",), ("save", "folder")]
        for rank in replica:
            assert ranks[rank]["done"] == expected
            assert ranks[rank]["progress"] == 5
        everybody = {rank: ("offload", rank) for rank in replica}
        assert ranks[leader]["found"][:2] == [everybody, {leader: ("token_stats", leader)}]
    # The errors from which a run can go on came to the leader, and the commands after them were carried out.
    unreachable, *found = ranks[2]["found"][2:]
    assert unreachable.startswith("weight sync: rank 0 of the actor cannot be reached at 127.0.0.1")
    assert found == ["rank 0 gave up", {}]
    assert ranks[3]["found"][2:] == [{}]


@pytest.mark.timeout(200)
@pytest.mark.ranks
def test_a_rank_that_fails_ends_its_loop_with_the_error() -> None:
    """Its outstanding call brings it to the driver, whatever the leader waits for."""
    assert run_ranks(2, failing, 2, free_port()) == [
        "ended with: the gradient is not finite",
        "could not collect",
    ]


def test_an_error_from_which_a_run_goes_on_keeps_no_memory_of_the_rank() -> None:
    """Ranks do not collect cycles of garbage by themselves, and an error holds the frames that it has passed."""

    class Slots:
        pass

    held: list[weakref.ref[Slots]] = []

    def lose_a_peer(slots: Slots) -> None:
        raise RuntimeError("Connection closed by peer")

    def run(method: str) -> None:
        slots = Slots()
        held.append(weakref.ref(slots))
        try:
            lose_a_peer(slots)
        except RuntimeError as error:
            raise RunError("another process cannot be reached") from error

    relay = Relay(ActorLayout(), 0, SimpleNamespace(set=lambda key, value: None))
    gc.disable()
    try:
        with pytest.raises(RunError, match="another process") as caught:
            relay.lead("send_weights", (), (), run)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert held[0]() is None
    finally:
        gc.enable()
