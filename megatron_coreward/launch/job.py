"""What is to run and on how much; checked before anything is queued."""

import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from megatron_coreward.config.accelerator import gpu_problems
from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.config.validate import setting_problems
from megatron_coreward.errors import InputError
from megatron_coreward.launch.settings import time_limit
from megatron_coreward.planner.hardware import GPUS
from megatron_coreward.planner.plan import gpus_of

# One rule for all backends, that of the strictest: a label of Kubernetes begins with a letter, and KubeRay takes names
# of RayJobs up to 47 characters, to which it adds its own. Ours end with `SUFFIX` there.
SUFFIX = "-coreward"
MAX_NAME = 47 - len(SUFFIX)
_DIGEST = 6  # characters in place of what a shortened name leaves out


@dataclass(frozen=True, slots=True)
class Job:
    """A run on nodes of a cluster."""

    config: RunConfig
    name: str  # in the queue
    nodes: int
    gpus_per_node: int  # 0: a run on CPUs
    time: str | None  # [days-]hours:minutes:seconds; None: as the cluster's file has it

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def used_gpus(self) -> int:
        """Those that the recipe's layout takes."""
        return gpus_of(self.config, self.config.rollout.placement)

    @property
    def config_text(self) -> str:
        """The resolved recipe, as the job reads it."""
        return dump_config(self.config)


def make_job(config: RunConfig, name: str | None, nodes: int, gpus_per_node: int, time: str | None) -> Job:
    """Checks what can be known before queueing.

    Args:
        name: in the queue; None: after the run directory.

    Raises:
        InputError: the run contradicts itself, does not fit on the GPUs, or could not go on after a preemption.
    """
    problems = [*setting_problems(config), *_room_problems(config, nodes, gpus_per_node)]
    if config.checkpoint.resume == "never":
        problems.append("checkpoint.resume is never: a launched run must be able to go on; set it to auto")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in str(config.run_dir)):
        problems.append(f"run_dir: {str(config.run_dir)!r} has control characters, which no job script can carry")
    if time is not None:
        try:
            time_limit(time)
        except ValueError as e:
            problems.append(f"--time: {time!r}; {e}")
    if name is not None and not is_name(name):
        problems.append(
            f"--name: {name!r}; allowed: up to {MAX_NAME} lower-case letters, digits and dashes, the first one a "
            "letter, the last one no dash"
        )
    if problems:
        raise InputError("\n".join(problems))
    return Job(config, name or name_after(config.run_dir.name), nodes, gpus_per_node, time)


def is_name(text: str) -> bool:
    """Whether every backend takes a name."""
    return len(text) <= MAX_NAME and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text) is not None


def name_after(text: str) -> str:
    """A name that every backend takes, after any text; one that is too long keeps its beginning and gets a digest."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
    if not name[0].isalpha():
        name = f"run-{name}"
    if len(name) > MAX_NAME:
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
        name = f"{name[: MAX_NAME - _DIGEST - 1].rstrip('-')}-{digest}"
    return name


def _room_problems(config: RunConfig, nodes: int, gpus_per_node: int) -> list[str]:
    """What of the layout the GPUs cannot take; nothing for a run on CPUs."""
    if not gpus_per_node:
        return []
    problems = []
    actors, size = config.actor.world_size, config.rollout.tensor_parallel
    engines = config.rollout.num_engines * size
    colocated = config.rollout.placement == "colocated"
    needed = gpus_of(config, config.rollout.placement)
    if needed > nodes * gpus_per_node:
        problems.append(
            f"--nodes {nodes} --gpus-per-node {gpus_per_node}: {nodes * gpus_per_node} GPUs, and the run needs "
            f"{needed} ({actors} actor ranks, {engines} for rollout engines{', colocated' if colocated else ''})"
        )
    if size > gpus_per_node:
        problems.append(
            f"rollout.tensor_parallel: an engine of {size} GPUs, and a node has {gpus_per_node} (--gpus-per-node); an "
            "engine is on one node"
        )
    elif colocated and gpus_per_node % size and engines > gpus_per_node:
        problems.append(
            f"rollout.tensor_parallel: {size} does not divide the {gpus_per_node} GPUs of a node (--gpus-per-node): an "
            "engine that shares the GPUs of actor ranks would be on two nodes"
        )
    return problems


def check_gpu(config: RunConfig, settings: Mapping[str, str | None]) -> None:
    """Args:
        settings: keys of a cluster's file that may name its GPUs, such as `A100-80GB`, and what they say.

    Raises:
        InputError: the run asks for what a GPU that is named there does not have.
    """
    for key, text in settings.items():
        for gpu in (gpu for name, gpu in GPUS.items() if name in (text or "").lower()):
            if problems := list(gpu_problems(config, gpu.capability)):
                raise InputError("\n".join(f"{problem} ({key}: {text})" for problem in problems))


def is_inside(path: PurePosixPath, folders: Iterable[str]) -> bool:
    """Whether a path lies in one of the folders, `..` in it followed by the names alone."""
    plain = PurePosixPath(posixpath.normpath(path))
    return any(plain.is_relative_to(posixpath.normpath(folder)) for folder in folders)
