"""The nodes of the cluster, and the room of a run on them: one Ray placement group, all of its GPUs at once or none.

Which rank and which engine goes to which node is decided by `planner.placement`, which a plan asks too.
"""

from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_coreward.errors import RunError
from megatron_coreward.planner.placement import Node, ResourceRequest, place

NODE_LABEL = "ray.io/node-id"
START_LIMIT_S = 600.0  # until there is room, if nothing else is configured
CPU_SHARE = 0.001  # of a core, for Ray, if a process takes no GPU: it only has to be placed


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
        self.nodes = [nodes[0], *(node for node in nodes[1:] if node.id in used)]  # the driver's first
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
