"""Ranks and engines on the nodes of a cluster: engines whole, neighbours together, nothing placed twice or nowhere."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.errors import InputError
from megatron_coreward.planner.placement import Node, ResourceRequest, place


def nodes(*gpus: int) -> list[Node]:
    return [Node(f"n{i}", f"10.0.0.{i}", count) for i, count in enumerate(gpus)]


ROOT = Path(__file__).parents[2]


def test_an_actor_fills_nodes_in_order_and_engines_take_what_is_left() -> None:
    placed = place(nodes(8, 8), ResourceRequest(ranks=8, rank_group=4, engines=4, engine_size=2))
    assert placed.ranks == ("n0",) * 8
    assert placed.engines == ("n1",) * 4


def test_large_blocks_go_first_so_that_small_ones_fit_in_between() -> None:
    placed = place(nodes(8, 8), ResourceRequest(ranks=8, rank_group=2, engines=1, engine_size=8))
    assert placed.engines == ("n0",)
    assert placed.ranks == ("n1",) * 8


def test_a_tensor_parallel_group_stays_on_a_node() -> None:
    placed = place(nodes(6, 6), ResourceRequest(ranks=8, rank_group=4, engines=2, engine_size=2))
    assert placed.ranks == ("n0",) * 4 + ("n1",) * 4
    assert placed.engines == ("n0", "n1")


def test_a_group_larger_than_a_node_spans_neighbours() -> None:
    placed = place(nodes(4, 4, 4), ResourceRequest(ranks=8, rank_group=8, engines=1, engine_size=4))
    assert Counter(placed.ranks) == {"n1": 4, "n2": 4}
    assert placed.engines == ("n0",)


def test_colocated_engines_are_where_their_ranks_are() -> None:
    placed = place(nodes(8, 8), ResourceRequest(ranks=16, rank_group=4, engines=4, engine_size=4, colocated=True))
    assert placed.engines == ("n0", "n0", "n1", "n1")


@pytest.mark.parametrize(
    ("gpus", "resource_request", "message"),
    [
        (
            (8, 8),
            ResourceRequest(8, 4, 1, 16),
            r"rollout.tensor_parallel: an engine of 16 GPUs, and the largest node has 8",
        ),
        ((8, 8), ResourceRequest(12, 4, 3, 2), r"needs 18 GPUs .*10\.0\.0\.0 8, 10\.0\.0\.1 8"),
        ((6, 6), ResourceRequest(8, 2, 1, 6), r"needs 14 GPUs"),
        (
            (6, 6),
            ResourceRequest(12, 2, 3, 4, colocated=True),
            r"engine 1 would share .* ranks 4 to 7, which are on 2 nodes",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    gpus: tuple[int, ...], resource_request: ResourceRequest, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        place(nodes(*gpus), resource_request)


def test_without_gpus_ranks_and_engines_are_spread_evenly() -> None:
    placed = place(nodes(0, 0), ResourceRequest(ranks=4, rank_group=2, engines=2, engine_size=1))
    assert placed.ranks == ("n0", "n0", "n1", "n1")
    assert placed.engines == ("n1", "n0")
    assert place(nodes(0), ResourceRequest(ranks=2, rank_group=1, engines=3, engine_size=2)).engines == ("n0",) * 3


@given(
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    group=st.sampled_from([1, 2, 4, 8, 16]),
    groups=st.integers(0, 6),
    engines=st.integers(0, 6),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_no_gpu_is_given_twice_and_everybody_has_one(
    gpus: list[int], group: int, groups: int, engines: int, size: int
) -> None:
    resource_request = ResourceRequest(group * groups, group, engines, size)
    try:
        placed = place(nodes(*gpus), resource_request)
    except InputError:
        return
    assert len(placed.ranks) == resource_request.ranks
    assert len(placed.engines) == engines
    used = Counter(placed.ranks) + Counter({home: size * n for home, n in Counter(placed.engines).items()})
    assert all(used[node.id] <= node.gpus for node in nodes(*gpus))
    if group <= max(gpus):
        for start in range(0, resource_request.ranks, group):
            assert len(set(placed.ranks[start : start + group])) == 1


TWICE = """
import ray
from megatron_coreward.cluster.placement import ReservedPlacement
from megatron_coreward.planner.placement import ResourceRequest

class Rank:
    def gpus(self):
        return ray.get_gpu_ids()

ray.init(address="local", num_gpus=2, num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
request = ResourceRequest(ranks=2, rank_group=1, engines=1, engine_size=2, colocated=True)
with ReservedPlacement(request, limit_s=60) as reservation:
    print(reservation.variables_for_engine(0)["CUDA_VISIBLE_DEVICES"])
    ranks = [ray.remote(Rank).options(num_cpus=0, **reservation.for_rank(i)).remote() for i in range(2)]
    print(",".join(str(gpu) for rank in ranks for gpu in ray.get(rank.gpus.remote(), timeout=60)))
    reservation._limit_s = 5
    print(reservation.variables_for_engine(0)["CUDA_VISIBLE_DEVICES"])
"""


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_a_colocated_engine_can_be_started_again_while_the_ranks_hold_its_gpus() -> None:
    """Ray counts GPUs that it was given, whether they exist or not."""
    environment = {**os.environ, "RAY_prestart_worker_first_driver": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    at_first, ranks, again = done.stdout.split()[-3:]
    assert at_first == ranks == again
    assert sorted(ranks.split(",")) == ["0", "1"]
