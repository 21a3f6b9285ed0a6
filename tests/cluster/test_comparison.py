"""Answers that are compared on several nodes get the verdicts that one machine gives, even if a node dies meanwhile."""

from collections.abc import Iterator

import pytest

from megatron_coreward.cluster.comparison import SpreadComparer, comparer_for
from megatron_coreward.planner.placement import Node
from megatron_coreward.rewards.symbolic import Request, SymbolicPool

pytestmark = pytest.mark.timeout(120)

# 600 pairs, more than are compared here alone: k x and x k are the same, k x and (k + 1) x are not.
REQUESTS = [
    Request((rf"{k}x", rf"x \cdot {k}", rf"{k + 1}x", f"{k} apples"), ((0, 1), (0, 2), (1, 2), (2, 3)))
    for k in range(2, 152)
]
VERDICTS = [[True, False, False, False]] * len(REQUESTS)


@pytest.fixture(scope="module")
def here() -> Iterator[Node]:
    from megatron_coreward.cluster.placement import living_nodes
    from megatron_coreward.cluster.ray_start import start_ray, stop_ray

    start_ray()
    yield living_nodes()[0]
    stop_ray()


@pytest.mark.ray
def test_the_pool_of_a_node_takes_its_part_and_what_it_had_when_it_dies_is_compared_here(here: Node) -> None:
    import ray

    comparer = SpreadComparer([here], 10.0, 1)
    asked: list[int] = []
    ask = comparer._ask

    def counted(node: Node, requests: list[Request]) -> list[list[bool]]:
        asked.append(len(requests))
        return ask(node, requests)  # type: ignore[return-value]

    comparer._ask = counted  # type: ignore[method-assign,assignment]
    try:
        assert comparer.compare(REQUESTS) == VERDICTS
        assert asked
        ray.kill(comparer._actors[here.id])
        assert comparer.compare(REQUESTS) == VERDICTS
        assert comparer._nodes == []  # a node that failed is not asked again
        before = len(asked)
        assert comparer.compare(REQUESTS) == VERDICTS
        assert len(asked) == before
    finally:
        comparer.close()


def test_only_a_run_on_several_machines_spreads_its_comparisons() -> None:
    a, b, c = Node("a", "10.0.0.1", 8), Node("b", "10.0.0.1", 8), Node("c", "10.0.0.2", 8)
    assert isinstance(comparer_for([a, b], 5.0), SymbolicPool)
    spread = comparer_for([a, b, c], 5.0)
    assert isinstance(spread, SpreadComparer)
    assert spread._nodes == [c]
