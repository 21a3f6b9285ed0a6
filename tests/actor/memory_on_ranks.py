"""What a checkpoint costs a rank: run by tests/actor/test_saving.py and benchmarks/bench_checkpoint.py."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.actor.on_ranks import make_setup, start


def _status(key: str) -> int:
    """Bytes of this process by a key of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> int:
    """Begins a new measurement of the peak; returns what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def save_and_resume(rank: int, path: Path, layout: dict[str, Any], port: int, folder: Path) -> dict[str, Any]:
    """A save and a resume: bytes that this rank owns, wrote, and took at most beside what it had before; seconds.

    "Owned" are the rank's weights and its shards of main parameters, moments and teacher: what a resume fills.
    """
    actor = start(rank, make_setup(path, layout, frozen_reference=False), port)
    from megatron_coreward.actor.shards import main_shards

    shards = [t for s in main_shards(actor.optimizer) for t in (s.value, s.state["exp_avg"], s.state["exp_avg_sq"])]
    weights = [param for chunk in actor.policy for param in chunk.parameters()]
    state = [*weights, *shards, *actor.teacher.values, *actor.teacher.compensations]
    owned = sum({t.data_ptr(): t.nbytes for t in state}.values())
    with torch.no_grad():
        for moment in shards:
            moment.add_(rank + 1e-3)  # so that pages exist, and that a resume has something to restore
    if rank == 0:
        (folder / "state").mkdir()
    dist.barrier()
    before = _forget_peak()
    begin = time.perf_counter()
    actor.begin_save(folder / "state")
    stall = time.perf_counter() - begin
    files = actor.finish_save()
    whole = time.perf_counter() - begin
    save_peak = _status("VmHWM") - before
    kept = [t.clone() for t in (*shards, *actor.teacher.values)]
    with torch.no_grad():
        for t in (*shards, *actor.teacher.values):
            t.zero_()
    before = _forget_peak()
    begin = time.perf_counter()
    actor.load(folder / "state")
    outcome = {
        "owned_bytes": owned,
        "written_bytes": sum(size for size, _ in files.values()),
        "save_stall_s": stall,
        "save_s": whole,
        "save_extra_bytes": save_peak,
        "resume_s": time.perf_counter() - begin,
        "resume_extra_bytes": _status("VmHWM") - before,
        "restored": all(torch.equal(a, b) for a, b in zip(kept, (*shards, *actor.teacher.values), strict=True)),
    }
    actor.shutdown()
    return outcome
