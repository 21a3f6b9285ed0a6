"""Ray of a run: the cluster that is joined or started, and what each worker's process is started with."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RaySystemError

from megatron_coreward.cluster.ray_security import check_token_needed, keep_to_this_host
from megatron_coreward.errors import RunError
from megatron_coreward.rollout import sockets


def start_ray(limit_s: float = 600.0) -> None:
    """Joins the cluster that `RAY_ADDRESS` names, or starts one on this machine, on loopback, without a dashboard.

    Ends the process if that takes longer than `limit_s`: it is one call into native code, which waits for ever if one
    of Ray's processes dies in it.
    """
    if not ray.is_initialized():
        with _no_longer_than(limit_s, "the start of Ray"):
            _init_ray()


@contextmanager
def _no_longer_than(limit_s: float, awaited: str) -> Iterator[None]:
    def give_up() -> None:
        text = f"stalled: {awaited} took longer than {limit_s:.0f} s (watchdog.start_limit_s)"
        print(f"the run failed: {text}; the same command tries again", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _init_ray() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would start a worker a core that nobody here uses, and wait for ever if one dies meanwhile (ray#40131).
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers are the run; at 15 any other process starves them
    if os.environ.get("RAY_ADDRESS"):
        _join(os.environ["RAY_ADDRESS"])
        return
    keep_to_this_host()
    ray.init(
        address="local",
        _temp_dir=str(sockets.ray_folder() / "ray"),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        object_store_memory=None if torch.cuda.is_available() else 2**30,
    )
    check_token_needed()


def _join(address: str) -> None:
    try:
        ray.init(log_to_driver=False)
    except (OSError, ValueError, RuntimeError, RaySystemError) as error:  # ConnectionError is an OSError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"RAY_ADDRESS: the cluster at {address!r} cannot be joined: {reason}") from error


def stop_ray() -> None:
    """Ends the processes of this run; a cluster that was joined stays."""
    if ray.is_initialized():
        ray.shutdown()


def worker_options(place: Mapping[str, Any], cpu_threads: int, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Ray options of a worker. OpenMP threads that spin between phases would starve the other processes of a core.

    Args:
        place: where it goes, and the GPUs that it takes.
        more: further environment variables.
    """
    variables = {
        "OMP_NUM_THREADS": str(cpu_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a process that takes no GPU of Ray's keeps seeing its own
    }
    if not torch.cuda.is_available():
        # Activations are freed and allocated again in every micro-batch: kept in the heap, they need no new pages (7%).
        variables |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
    return {
        "num_cpus": 0,
        "runtime_env": {"env_vars": variables | dict(more or {})},
        "max_restarts": 0,
        **place,
    }
