"""Which node each actor rank and each engine runs on, by the numbers of GPUs alone.

Rules, in order:
  1. An engine is on one node: its tensor-parallel ranks talk in every layer of every token.
  2. So is a tensor-parallel group of the actor, if a node has room for one.
  3. Neighbouring ranks are close: pipeline and data parallelism cross nodes last.
  4. Colocated, engine e shares the GPUs of actor ranks e t, ..., e t + t - 1.

A plan asks it before anything is queued, and a run (`cluster.placement`) for the nodes that it found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_coreward.config.schema import ActorSettings, RunConfig
from megatron_coreward.errors import InputError


@dataclass(frozen=True, slots=True)
class Node:
    """A node that is alive."""

    id: str
    address: str
    gpus: int


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What a run wants to place."""

    ranks: int  # of the actor
    rank_group: int  # neighbouring ranks that belong on one node: the actor's tensor parallelism
    engines: int
    engine_size: int  # GPUs of an engine
    colocated: bool = False

    @staticmethod
    def of_run(config: RunConfig) -> "ResourceRequest":
        """A run's actor and engines."""
        return ResourceRequest(
            ranks=config.actor.world_size,
            rank_group=config.actor.tensor_parallel,
            engines=config.rollout.num_engines,
            engine_size=config.rollout.tensor_parallel,
            colocated=config.rollout.placement == "colocated",
        )

    @staticmethod
    def of_actors(actor: ActorSettings) -> "ResourceRequest":
        """An actor alone."""
        return ResourceRequest(actor.world_size, actor.tensor_parallel, 0, 1)

    @staticmethod
    def of_engines(engines: int, engine_size: int) -> "ResourceRequest":
        """Engines alone, of `engine_size` GPUs each."""
        return ResourceRequest(0, 1, engines, engine_size)

    @property
    def gpus(self) -> int:
        return self.ranks + (0 if self.colocated else self.engines * self.engine_size)


@dataclass(frozen=True, slots=True)
class Placement:
    """Node ids."""

    ranks: tuple[str, ...]
    engines: tuple[str, ...]


def place(nodes: Sequence[Node], resource_request: ResourceRequest) -> Placement:
    """Places ranks and engines on nodes with GPUs, or evenly over all nodes if none has any.

    Raises:
        InputError: there is not enough room, or not enough on one node.
    """
    if not any(node.gpus for node in nodes):
        return _spread(nodes, resource_request)
    size, largest = resource_request.engine_size, max(node.gpus for node in nodes)
    if resource_request.engines and size > largest:
        raise InputError(
            f"rollout.tensor_parallel: an engine of {size} GPUs, and the largest node has {largest}; allowed: up to "
            f"{largest}, on one node"
        )
    free = {node.id: node.gpus for node in nodes}
    group = resource_request.rank_group if resource_request.rank_group <= largest else 1
    ranks: list[str] = []
    engines: list[str] = []

    def fill(wanted: list[str], number: int, block: int) -> None:
        for node in nodes:
            while len(wanted) < number and free[node.id] >= block:
                wanted += [node.id] * block
                free[node.id] -= block

    fill_engines = (engines, resource_request.engines * size, size)
    blocks = (
        [(ranks, resource_request.ranks, group)]
        if resource_request.colocated
        else [(ranks, resource_request.ranks, group), fill_engines]
    )
    for wanted, number, block in sorted(blocks, key=lambda b: -b[2]):  # large ones first: small ones fit in between
        fill(wanted, number, block)
    if resource_request.colocated:
        engines = list(_colocated(ranks, resource_request))
    if len(ranks) < resource_request.ranks or len(engines) < resource_request.engines * size:
        have = ", ".join(f"{node.address} {node.gpus}" for node in nodes)
        raise InputError(
            f"the run needs {resource_request.gpus} GPUs ({resource_request.ranks} actor ranks in groups of {group} "
            f"on a node, {resource_request.engines} engines of {size}"
            f"{', on the same GPUs' if resource_request.colocated else ''}); "
            f"the cluster's nodes have: {have}"
        )
    return Placement(tuple(ranks), tuple(engines[::size]))


def _colocated(ranks: Sequence[str], resource_request: ResourceRequest) -> Iterator[str]:
    size = resource_request.engine_size
    for engine in range(resource_request.engines):
        homes = ranks[engine * size : engine * size + size]
        if len(set(homes)) > 1:
            raise InputError(
                f"rollout.tensor_parallel: engine {engine} would share the GPUs of actor ranks {engine * size} to "
                f"{engine * size + size - 1}, which are on {len(set(homes))} nodes; allowed: a size that divides the "
                "GPUs of a node"
            )
        yield from homes


def _spread(nodes: Sequence[Node], resource_request: ResourceRequest) -> Placement:
    groups = max(1, resource_request.ranks // resource_request.rank_group)
    return Placement(
        tuple(
            nodes[(rank // resource_request.rank_group) * len(nodes) // groups].id
            for rank in range(resource_request.ranks)
        ),
        tuple(
            nodes[len(nodes) - 1 - i * len(nodes) // resource_request.engines].id
            for i in range(resource_request.engines)
        ),
    )
