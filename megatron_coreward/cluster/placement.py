"""Which node of the cluster each actor rank and each engine runs on.

Rules, in order:
  1. An engine is on one node: its tensor-parallel ranks talk in every layer of every token.
  2. So is a tensor-parallel group of the actor, if a node has room for one.
  3. Neighbouring ranks are close: pipeline and data parallelism cross nodes last.
  4. Colocated, engine e shares the GPUs of actor ranks e t, ..., e t + t - 1.

`place` is pure. `ReservedPlacement` makes a Ray placement group of it: all of a run's GPUs at once or none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.errors import InputError, RunError

NODE_LABEL = "ray.io/node-id"
START_LIMIT_S = 600.0  # until there is room, if nothing else is configured
CPU_SHARE = 0.001  # of a core, for Ray, if a process takes no GPU: it only has to be placed


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


def living_nodes() -> list[Node]:
    """The nodes of the cluster that was joined, the driver's first, then by address."""
    here = ray.get_runtime_context().get_node_id()
    found = [
        Node(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (node.id != here, node.address, node.id))


class ReservedPlacement:
    """The room of one run, from the start of its processes to their end."""

    def __init__(self, resource_request: ResourceRequest, limit_s: float) -> None:
        """Reserves everything at once.

        Raises:
            InputError: the cluster is too small, whoever uses it.
            RunError: it is large enough, and was not free for `limit_s`.
        """
        nodes = living_nodes()
        placement = place(nodes, resource_request)
        self.resource_request, self.placement, self._limit_s = resource_request, placement, limit_s
        self.on_gpus = any(node.gpus for node in nodes)
        used = {*placement.ranks, *placement.engines}
        self.num_hosts = len({node.address for node in nodes if node.id in used})
        unit = {"GPU": 1.0} if self.on_gpus else {"CPU": CPU_SHARE}
        of_engine = {"GPU": float(resource_request.engine_size)} if self.on_gpus else {"CPU": CPU_SHARE}
        homes, bundles = list(placement.ranks), [unit] * resource_request.ranks
        self._first_engine = len(bundles)
        if not (resource_request.colocated and self.on_gpus):
            homes += placement.engines
            bundles += [of_engine] * resource_request.engines
        self._gpus: dict[int, list[Any]] = {}  # of a bundle, asked for once: later its actor rank holds them
        self._group: PlacementGroup = placement_group(
            bundles, strategy="PACK", bundle_label_selector=[{NODE_LABEL: home} for home in homes]
        )
        try:
            ray.get(self._group.ready(), timeout=limit_s)
        except GetTimeoutError:
            remove_placement_group(self._group)
            raise RunError(
                f"the cluster has {resource_request.gpus} GPUs for the run, and they were not free for {limit_s:.0f} s "
                "(watchdog.start_limit_s)"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Frees the room; what still runs in it is killed."""
        if ray.is_initialized():
            remove_placement_group(self._group)

    def for_rank(self, rank: int) -> dict[str, Any]:
        """Ray options of an actor rank."""
        return {"num_gpus": 1 if self.on_gpus else 0, "scheduling_strategy": self._at(rank)}

    def for_engine(self, engine: int) -> dict[str, Any]:
        """Ray options of an engine; colocated, its GPUs are named by `variables_for_engine`."""
        if not self.on_gpus:
            return {"num_gpus": 0, "scheduling_strategy": self._at(self._first_engine + engine)}
        size = self.resource_request.engine_size
        if self.resource_request.colocated:
            return {"num_gpus": 0, "scheduling_strategy": self._at(engine * size)}
        return {"num_gpus": size, "scheduling_strategy": self._at(self._first_engine + engine)}

    def variables_for_engine(self, engine: int) -> dict[str, str]:
        """Environment of an engine. Ray gives a GPU to one process; a second one has to be given its number."""
        if not (self.resource_request.colocated and self.on_gpus):
            return {}
        bundles = range(engine * self.resource_request.engine_size, (engine + 1) * self.resource_request.engine_size)
        new = [bundle for bundle in bundles if bundle not in self._gpus]
        ask = [
            ray.remote(_gpus_here).options(num_gpus=1, num_cpus=0, scheduling_strategy=self._at(bundle)).remote()
            for bundle in new
        ]
        self._gpus.update(zip(new, ray.get(ask, timeout=self._limit_s), strict=True))
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for bundle in bundles for gpu in self._gpus[bundle])}

    def _at(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)


def _gpus_here() -> list[Any]:
    return list(ray.get_gpu_ids())
