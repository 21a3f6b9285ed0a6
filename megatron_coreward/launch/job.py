"""What is to run and on how much; checked before anything is queued."""

import re
from dataclasses import dataclass

from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import InputError
from megatron_coreward.launch.settings import time_limit


@dataclass(frozen=True, slots=True)
class Job:
    """A run on nodes of a cluster."""

    config: RunConfig
    name: str  # in the queue
    nodes: int
    gpus_per_node: int  # 0: a run on CPUs
    time: str | None  # [days-]hours:minutes:seconds; None: as the cluster's file has it

    @property
    def config_text(self) -> str:
        """The resolved recipe, as the job reads it."""
        return dump_config(self.config)


def make_job(config: RunConfig, name: str | None, nodes: int, gpus_per_node: int, time: str | None) -> Job:
    """Checks what can be known before queueing.

    Raises:
        InputError: the run does not fit on the GPUs, or it could not go on after a preemption.
    """
    actors, engines = config.actor.world_size, config.rollout.num_engines * config.rollout.tensor_parallel
    colocated = config.rollout.placement == "colocated"
    needed = max(actors, engines) if colocated else actors + engines
    if gpus_per_node and needed > nodes * gpus_per_node:
        raise InputError(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: {nodes * gpus_per_node} GPUs, and the run needs "
            f"{needed} ({actors} actor ranks, {engines} for rollout engines{', colocated' if colocated else ''})"
        )
    if config.checkpoint.resume == "never":
        raise InputError("checkpoint.resume is never: a launched run must be able to go on; set it to auto")
    if time is not None:
        try:
            time_limit(time)
        except ValueError as e:
            raise InputError(f"--time: {time!r}; {e}") from None
    name = name or re.sub(r"[^a-z0-9]+", "-", config.run_dir.name.lower()).strip("-") or "run"
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(f"--name: {name!r}; allowed: up to 40 lower-case letters, digits and dashes")
    return Job(config, name, nodes, gpus_per_node, time)
