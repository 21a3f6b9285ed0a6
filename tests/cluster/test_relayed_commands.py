"""The driver calls the leaders of the replicas, and still hears of every rank: of its death, and that it is behind."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from megatron_coreward.actor.relay import Relay, replica_of
from megatron_coreward.cluster.actor_group import ActorGroup
from megatron_coreward.cluster.watchdog import Watchdog, WorkerDied
from megatron_coreward.config.schema import WatchdogSettings
from megatron_coreward.errors import RunError
from megatron_coreward.weights.layouts import ActorLayout
from megatron_coreward.weights.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
LAYOUT = ActorLayout(pipeline_parallel=3)


class LightRank:
    """A rank without a model: `ActorWorker`'s methods, as far as the group calls them."""

    def __init__(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        self.rank = rank
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=LAYOUT.world_size)
        self.relay = Relay(LAYOUT, rank, dist.TCPStore("127.0.0.1", port, is_master=False))

    def _run(self, method: str, *arguments: Any) -> Any:
        if method == "hang" and self.rank in arguments:
            time.sleep(600)
        if method == "die" and self.rank in arguments:
            os._exit(1)
        if method == "fail" and self.rank in arguments:
            raise ValueError(f"rank {self.rank} cannot do that")
        return f"{method} {self.rank}"

    def ready(self) -> int:
        return os.getpid()

    def lead(self, method: str, wanted: Any, *arguments: Any) -> dict[int, Any]:
        return self.relay.lead(method, arguments, wanted, self._run)

    def follow(self) -> None:
        self.relay.follow(self._run)

    def shutdown(self) -> None:
        if self.relay.leads:
            self.relay.dismiss()


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def group(notes: list[str]) -> Iterator[Any]:
    from megatron_coreward.cluster.ray_start import start_ray

    start_ray()
    watchdog = Watchdog(WatchdogSettings(warn_after_s=2.0, limit_s=5.0), notes.append)
    ranks: Any = object.__new__(ActorGroup)
    ranks.kind, ranks.watchdog, ranks.workers, ranks._commands = "actor rank", watchdog, [], 0
    port = free_port()
    ranks._address = ("127.0.0.1", port)
    for rank in range(LAYOUT.world_size):
        ranks.add(ray.remote(num_cpus=0)(LightRank).remote(rank, port), rank)
    ray.get([worker.ready.remote() for worker in ranks.workers], timeout=120)
    ranks.replicas = [replica_of(LAYOUT, 0)]
    ranks.listen_to_lives()
    yield ranks
    ranks.kill()


def test_one_call_reaches_all_ranks_and_brings_what_is_wanted(group: Any) -> None:
    assert len(group.begin("say").calls) == 1
    assert group.call("say") == ["say 0", "say 1", "say 2"]
    assert group.call("say", results_of=(1,)) == ["say 1"]


@pytest.mark.parametrize("rank", [0, 2])
def test_the_death_of_any_rank_is_heard_of_at_once_and_named(group: Any, rank: int) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerDied, match=f"actor rank {rank} died during die"):
        group.call("die", rank)
    assert time.monotonic() - begin < 4


def test_the_error_of_any_rank_is_the_drivers(group: Any) -> None:
    with pytest.raises(ValueError, match="rank 1 cannot do that"):
        group.call("fail", 1)


def test_a_wait_that_is_long_names_the_ranks_that_are_behind(group: Any, notes: list[str]) -> None:
    group.call("say")
    with pytest.raises(RunError, match="stalled: waited for hang from actor rank 1 for"):
        group.call("hang", 1)
    assert "still waiting for hang from actor rank 1 after" in notes[0]


def test_after_the_last_command_everybody_leaves(group: Any) -> None:
    pids = ray.get([group.workers[2].ready.remote()])
    group.call("say")
    begin = time.monotonic()
    group.shutdown(patience_s=10)
    assert time.monotonic() - begin < 8
    assert pids
