"""Comparison of answers on every node of a run: one pool of processes a node, which take from one common queue of work.

Invariants: a verdict does not depend on the node that found it; what a node that died had taken is compared on this
machine, so no verdict is lost with it. Few pairs are compared here alone: the way to another node takes longer.
"""

import queue
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from megatron_coreward.cluster.ray_start import worker_options
from megatron_coreward.planner.placement import Node
from megatron_coreward.rewards.symbolic import (
    OVERTIME_S,
    STALL_FACTOR,
    START_LIMIT_S,
    Comparer,
    Outcome,
    Request,
    SymbolicPool,
)

FEW_PAIRS = 500  # are not spread
BATCHES_A_NODE = 4  # more even out what takes long, fewer wait less for the network


class PoolOfNode:
    """The pool of another node, in a process of Ray's there."""

    def __init__(self, timeout_s: float, num_workers: int | None) -> None:
        self._pool = SymbolicPool(timeout_s, num_workers)

    def compare(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """See `symbolic.Comparer`."""
        return self._pool.compare(requests)


class SpreadComparer:
    """Processes on this machine and on other nodes, as one `symbolic.Comparer`.

    nodes: the other nodes. timeout_s, num_workers: of each node's pool, as in `symbolic.SymbolicPool`.
    """

    def __init__(self, nodes: Sequence[Node], timeout_s: float, num_workers: int | None = None) -> None:
        self._here = SymbolicPool(timeout_s, num_workers)
        self._nodes = list(nodes)
        self._settings = (timeout_s, num_workers)
        self._actors: dict[str, Any] = {}  # by node; started when first needed

    def compare(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        """See `symbolic.Comparer`."""
        total = sum(len(request.pairs) for request in requests)
        if total <= FEW_PAIRS or not self._nodes:
            return self._here.compare(requests)
        outcomes: list[list[Outcome]] = [[] for _ in requests]
        work: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for batch in _batches(requests, total / (BATCHES_A_NODE * (len(self._nodes) + 1))):
            work.put(batch)

        def serve(node: Node) -> None:
            while (batch := _next(work)) is not None:
                try:
                    found = self._ask(node, [requests[i] for i in batch])
                except (RayError, GetTimeoutError):  # the node is gone, or as good as
                    work.put(batch)
                    self._forget(node)
                    return
                for i, outcome in zip(batch, found, strict=True):
                    outcomes[i] = outcome

        def serve_here() -> None:
            while (batch := _next(work)) is not None:
                for i, outcome in zip(batch, self._here.compare([requests[i] for i in batch]), strict=True):
                    outcomes[i] = outcome

        threads = [threading.Thread(target=serve, args=(node,), daemon=True) for node in list(self._nodes)]
        for thread in threads:
            thread.start()
        serve_here()
        for thread in threads:
            thread.join()
        serve_here()  # what a node put back when it died
        return outcomes

    def _ask(self, node: Node, requests: Sequence[Request]) -> list[list[Outcome]]:
        if node.id not in self._actors:
            there = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
            actor = ray.remote(PoolOfNode).options(**worker_options(there, 1))
            self._actors[node.id] = actor.remote(*self._settings)
        pairs = sum(len(request.pairs) for request in requests)
        limit_s = START_LIMIT_S + pairs * (self._settings[0] * STALL_FACTOR + OVERTIME_S)
        outcomes: list[list[Outcome]] = ray.get(self._actors[node.id].compare.remote(requests), timeout=limit_s)
        return outcomes

    def _forget(self, node: Node) -> None:
        """Of a node that failed nothing more is asked."""
        self._nodes.remove(node)
        self._end(self._actors.pop(node.id, None))

    def close(self) -> None:
        """See `symbolic.Comparer`."""
        self._here.close()
        while self._actors:
            self._end(self._actors.popitem()[1])

    @staticmethod
    def _end(actor: Any) -> None:
        if actor is not None and ray.is_initialized():
            ray.kill(actor)


def comparer_for(nodes: Sequence[Node], timeout_s: float, num_workers: int | None = None) -> Comparer:
    """Processes on every machine of a run.

    Args:
        nodes: the driver's first, then those of the run. Of several nodes of one machine, one is used.
    """
    by_machine = {node.address: node for node in reversed(nodes)}
    others = [node for address, node in by_machine.items() if address != nodes[0].address]
    return SpreadComparer(others, timeout_s, num_workers) if others else SymbolicPool(timeout_s, num_workers)


def _next(work: "queue.SimpleQueue[list[int]]") -> list[int] | None:
    try:
        return work.get_nowait()
    except queue.Empty:
        return None


def _batches(requests: Sequence[Request], size: float) -> list[list[int]]:
    """Indices of the requests, in batches of at least that many pairs, except the last."""
    batches: list[list[int]] = [[]]
    pairs = 0
    for index, request in enumerate(requests):
        batches[-1].append(index)
        pairs += len(request.pairs)
        if pairs >= size:
            batches.append([])
            pairs = 0
    return [batch for batch in batches if batch]
