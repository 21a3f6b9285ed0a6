"""This machine against what the run takes: devices, memory (`preflight.memory`), shared memory, disk.

Shared memory and disk are lower bounds: a refusal is certain to be right, a pass promises nothing. A run that joins a
cluster (`RAY_ADDRESS`) is on other machines: only its run directory is checked here.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from megatron_coreward.config.accelerator import GpuSupport, machine_problems, parse_version
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.methods import needs_of
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.preflight.memory import gpu_problems, host_problems, parameters
from megatron_coreward.preflight.packages import installed
from megatron_coreward.rollout import sockets
from megatron_coreward.weights.mailbox import NUM_SLOTS, remove_orphans
from megatron_coreward.weights.spec import tensors_to_send

SHARED_MEMORY = Path("/dev/shm")
# What a run writes into its directory: a link there would lead its writes, and the removal of checkpoints, elsewhere.
# Something of another kind in the place of one ends the run late, except for those that it can do without (None).
OWN_NAMES: Mapping[str, Literal["file", "directory"] | None] = {
    "anchors.jsonl": "file",
    "checkpoints": "directory",
    "config.yaml": "file",
    "events.log": None,
    "hf": "directory",
    "labels.jsonl": "file",
    "lock": "file",
    "logs": "directory",
    "metrics.jsonl": "file",
    "missed.json": None,
    "mlflow_run_id": None,
    "report.html": None,
    "rollbacks.jsonl": "file",
    "rollouts": "directory",
    "tensorboard": None,
    "timeline.jsonl": "file",
    "wandb": None,
    "wandb_id": None,
}


def joins_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def visible_gpus(devices: Path = Path("/dev")) -> int:
    """CUDA devices that a process of this machine can use, 0 with a build of torch that has no CUDA."""
    if (installed("torch") or "").endswith("+cpu"):
        return 0
    present = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not present:
        return present
    names = [name.strip() for name in named.split(",")]
    usable = names.index("-1") if "-1" in names else len(names)  # CUDA stops at the first that is none
    return len([name for name in names[:usable] if name])


def describe(gpus: int) -> GpuSupport:
    """The GPUs and packages of this machine, as far as the driver's own tool and the packages' metadata say."""
    packages = {name: parse_version(found) for name in ("transformer-engine",) if (found := installed(name))}
    build = re.search(r"\+cu(\d+)(\d)$", installed("torch") or "")
    cuda = (int(build[1]), int(build[2])) if build else None
    return GpuSupport(gpus, _capability() if gpus else None, cuda, packages)


def _capability() -> tuple[int, ...] | None:
    """Compute capability of the weakest GPU; None if `nvidia-smi` does not say."""
    return min((version for line in _ask_driver("compute_cap") if (version := parse_version(line))), default=None)


def gpu_memory() -> tuple[int, int] | None:
    """Bytes that are free on the fullest GPU, and all that it has; None if `nvidia-smi` does not say."""
    lines = (re.fullmatch(r"(\d+), *(\d+)", line) for line in _ask_driver("memory.free,memory.total"))
    return min(((int(found[1]) * 2**20, int(found[2]) * 2**20) for found in lines if found), default=None)


def _ask_driver(query: str) -> list[str]:
    """One answer a GPU, without units; none if there is no driver."""
    try:
        output = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in output.splitlines()]


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, at most the container's limit; None if nobody says."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    free = int(found[1]) * 1024 if found else None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return free
    return limit if free is None else min(free, limit)


def free_bytes(folder: Path) -> int | None:
    """Bytes of a file system that are free; None if there is none."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def problems(config: RunConfig, arch: Architecture | None) -> Iterator[str]:
    """What this machine has too little of."""
    yield from _run_dir(config)
    if arch is not None:
        yield from _disk(config, arch)
    if joins_cluster():
        return
    yield from sockets.problems(config.rollout.tensor_parallel > 1)
    gpus = visible_gpus()
    yield from machine_problems(config, describe(gpus))
    if gpus:
        yield from _gpus(config, gpus)
        if arch is not None and (memory := gpu_memory()) is not None:
            yield from gpu_problems(config, arch, *memory)
    elif arch is not None and (free := available_memory()) is not None:
        yield from host_problems(config, arch, free)
    if arch is not None and not (gpus and config.sync.transport == "auto"):  # which goes from GPU to GPU
        yield from _shared_memory(config, arch)


def _gpus(config: RunConfig, gpus: int) -> Iterator[str]:
    actors = config.actor.world_size
    engines = config.rollout.num_engines * config.rollout.tensor_parallel
    needed = max(actors, engines) if config.rollout.placement == "colocated" else actors + engines
    if needed > gpus:
        yield (
            f"actor layout and rollout.num_engines: {actors} actor ranks and {engines} engine ranks need "
            f"{needed} GPUs, found {gpus} on this machine; choose smaller sizes, or join a Ray cluster with "
            "RAY_ADDRESS"
        )


def _shared_memory(config: RunConfig, arch: Architecture) -> Iterator[str]:
    if config.sync.transport not in ("auto", "shared_memory") or not SHARED_MEMORY.is_dir():
        return
    remove_orphans()  # of runs that were killed, or else they would count
    free = free_bytes(SHARED_MEMORY)
    model = sum(meta.nbytes for meta in tensors_to_send(arch, config.model.dtype))
    needed = NUM_SLOTS * min(model, int(config.sync.bucket_mib * 2**20))
    if free is not None and needed > free:
        yield (
            f"sync.bucket_mib: {config.sync.bucket_mib:g} takes {_gib(needed)} in {SHARED_MEMORY} (two buckets), "
            f"{_gib(free)} are free; choose a smaller one, or more room (docker: --shm-size)"
        )


def _existing(path: Path) -> Path:
    """The path or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _run_dir(config: RunConfig) -> Iterator[str]:
    here = config.run_dir
    folder = _existing(here)
    if not folder.is_dir():
        if folder != here.absolute():
            yield f"run_dir: {here} cannot be made, {folder} is a file"
        return
    yield from _length(here, folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield f"run_dir: {here} cannot be written ({folder}: {error.strerror}); choose another run_dir"
    for name, kind in OWN_NAMES.items():
        path = here / name
        if kind is not None and path.exists() and path.is_dir() != (kind == "directory"):
            yield f"run_dir: {path} is no {kind}, and the run needs one of this name; move it away"
    inside = Path(os.path.realpath(here))
    saved = here / "checkpoints"
    for link in (*(here / name for name in OWN_NAMES), *(saved.iterdir() if saved.is_dir() else ())):
        if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(inside):
            yield (
                f"run_dir: {link} is a link to {os.path.realpath(link)}, outside of the run directory; a run writes "
                "and removes only inside: make run_dir itself the link"
            )


def _length(path: Path, existing: Path) -> Iterator[str]:
    """Names against what the file system takes: of folders that are not made yet it says nothing else."""
    limit = os.pathconf(existing, "PC_NAME_MAX")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > limit:
        yield f"run_dir: File name too long: a name of {longest} bytes; allowed: up to {limit} on this file system"


def checkpoint_bytes(config: RunConfig, arch: Architecture) -> int:
    """Bytes of one checkpoint at least."""
    item = 4 if config.model.dtype == "float32" else 2
    # Weights; main parameters and two moments; value and compensation of the teacher.
    return sum(parameters(arch)) * (item + 12 + (8 if needs_of(config.method).teacher else 0))


def model_bytes(config: RunConfig, arch: Architecture) -> int:
    """Bytes of the final model."""
    return sum(parameters(arch)) * (4 if config.model.dtype == "float32" else 2)


def least_disk(config: RunConfig, arch: Architecture) -> int:
    """Bytes of the final model and of the checkpoints that exist at a time, the one that is being written included."""
    saves = -(-config.steps // config.checkpoint.every) if config.checkpoint.every else 1
    return model_bytes(config, arch) + checkpoint_bytes(config, arch) * min(saves, config.checkpoint.keep + 1)


def _disk(config: RunConfig, arch: Architecture) -> Iterator[str]:
    free, needed = free_bytes(_existing(config.run_dir)), least_disk(config, arch)
    old = config.run_dir / "checkpoints"
    if old.is_dir():
        return  # the room that old checkpoints take is used again
    if free is not None and needed > free:
        yield (
            f"run_dir: checkpoints and the final model take {_gib(needed)} at least, {_gib(free)} are free in "
            f"{_existing(config.run_dir)}; choose another disk or a smaller checkpoint.keep"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
