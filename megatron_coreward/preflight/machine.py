"""This machine against what the run takes at least: devices, memory, shared memory, disk. Lower bounds, no estimates.

A refusal is certain to be right, a pass promises nothing: activations, buffers of libraries and the processes
themselves (about 1 GiB each) are not counted. A run that joins a cluster (`RAY_ADDRESS`) is on other machines: only its
run directory is checked here.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_coreward.config.accelerator import GpuSupport, machine_problems, parse_version
from megatron_coreward.config.architecture import Architecture
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.preflight.packages import installed
from megatron_coreward.rewards.methods import METHODS
from megatron_coreward.weights.layouts import expert_number
from megatron_coreward.weights.mailbox import NUM_SLOTS, remove_orphans
from megatron_coreward.weights.mapping import hf_tensors
from megatron_coreward.weights.spec import tensors_to_send

SHARED_MEMORY = Path("/dev/shm")
# What a run writes into its directory: a link there would lead its writes, and the removal of checkpoints, elsewhere.
OWN_NAMES = (
    "checkpoints",
    "config.yaml",
    "events.log",
    "hf",
    "labels.jsonl",
    "lock",
    "logs",
    "metrics.jsonl",
    "report.html",
    "rollbacks.jsonl",
    "rollouts",
    "tensorboard",
    "wandb",
    "wandb_id",
)


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
    packages = {name: parse_version(found) for name in ("transformer-engine", "apex") if (found := installed(name))}
    build = re.search(r"\+cu(\d+)(\d)$", installed("torch") or "")
    cuda = (int(build[1]), int(build[2])) if build else None
    return GpuSupport(gpus, _capability() if gpus else None, cuda, packages)


def _capability() -> tuple[int, ...] | None:
    """Compute capability of the weakest GPU; None if `nvidia-smi` does not say."""
    try:
        output = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return min((version for line in output.splitlines() if (version := parse_version(line.strip()))), default=None)


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
    gpus = visible_gpus()
    yield from machine_problems(config, describe(gpus))
    if gpus:
        yield from _gpus(config, gpus)
    elif arch is not None:
        yield from _memory(config, arch)
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


def parameters(arch: Architecture) -> tuple[int, int]:
    """Numbers outside of experts and inside."""
    counts = [0, 0]
    for name, shape in hf_tensors(arch).items():
        size = 1
        for length in shape:
            size *= length
        counts[expert_number(name) is not None] += size
    return counts[0], counts[1]


def least_memory(config: RunConfig, arch: Architecture) -> dict[str, int]:
    """Bytes that a run takes on a machine without GPUs, over all its processes, by what takes them."""
    dense, expert = parameters(arch)
    a, r, needs = config.actor, config.rollout, METHODS[config.method].needs
    item = 4 if config.model.dtype == "float32" else 2
    once = dense + expert
    copies = a.data_parallel * dense + max(1, a.data_parallel // a.expert_parallel) * expert  # over data-parallel ranks
    # Main parameters of an fp32 model are the model's own; two moments; value and compensation of the teacher.
    parts = {
        "weights and gradients": copies * (item + 4),
        "optimizer": once * (8 if item == 4 else 12),
        "teacher": (once * 8 + copies * item) if needs.teacher else 0,
        "frozen reference": copies * item if config.loss.kl_reference == "frozen" and config.loss.kl_coef else 0,
        "engines": r.num_engines * once * item,
        "key-value caches (rollout.kv_cache_gib)": int(r.num_engines * r.tensor_parallel * r.kv_cache_gib * 2**30),
    }
    return {name: size for name, size in parts.items() if size}


def _memory(config: RunConfig, arch: Architecture) -> Iterator[str]:
    free, parts = available_memory(), least_memory(config, arch)
    needed = sum(parts.values())
    if free is not None and needed > free:
        largest = max(parts, key=lambda name: parts[name])
        yield (
            f"memory: the run needs {_gib(needed)} at least ({largest}: {_gib(parts[largest])}), {_gib(free)} are "
            "available; choose a smaller model, rollout.kv_cache_gib, rollout.num_engines or actor.data_parallel"
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
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield f"run_dir: {here} cannot be written ({folder}: {error.strerror}); choose another run_dir"
    inside = Path(os.path.realpath(here))
    saved = here / "checkpoints"
    for link in (*(here / name for name in OWN_NAMES), *(saved.iterdir() if saved.is_dir() else ())):
        if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(inside):
            yield (
                f"run_dir: {link} is a link to {os.path.realpath(link)}, outside of the run directory; a run writes "
                "and removes only inside: make run_dir itself the link"
            )


def checkpoint_bytes(config: RunConfig, arch: Architecture) -> int:
    """Bytes of one checkpoint at least."""
    item = 4 if config.model.dtype == "float32" else 2
    # Weights; main parameters and two moments; value and compensation of the teacher.
    return sum(parameters(arch)) * (item + 12 + (8 if METHODS[config.method].needs.teacher else 0))


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
