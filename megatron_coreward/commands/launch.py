"""`launch local | slurm | kubernetes | skypilot CONFIG [key=value ...]`: a run on this machine or on a cluster."""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_coreward.commands.arguments import whole
from megatron_coreward.errors import InputError
from megatron_coreward.telemetry.untrusted_text import say

if TYPE_CHECKING:
    from megatron_coreward.launch.job import Job
    from megatron_coreward.launch.supervise import Backend

_PAPER = "configs/paper/qwen3_8b_base_math_co_rewarding"
_NODES = f"{_PAPER}_ii.yaml --nodes 2 --gpus-per-node 8"  # as many GPUs as the recipe uses
_EXAMPLES = {
    "local": f"{_PAPER}_i.yaml --gpus-per-node 8",
    "slurm": _NODES,
    "kubernetes": f"{_NODES} run_dir=/runs/one",
    "skypilot": f"{_NODES} run_dir=/runs/one",
}
_HELP = {
    "local": "run on this machine, and start again until the run is finished",
    "slurm": "run as a Slurm job, with containers (Pyxis) or without",
    "kubernetes": "run as a KubeRay RayJob",
    "skypilot": "run as a SkyPilot managed job",
}


def add(commands: Any) -> None:
    examples = {
        kind: f"megatron-coreward launch {kind} {what} --cluster launch/clusters/{kind}.yaml"
        for kind, what in _EXAMPLES.items()
    }
    launch = commands.add_parser(
        "launch",
        help="run on a cluster, follow it, and submit it again until it is finished",
        example=f"{examples['slurm']} --dry-run",
    )
    kinds = launch.add_subparsers(required=True, metavar="WHERE")
    for kind, text in _HELP.items():
        parser = kinds.add_parser(kind, help=text, example=examples[kind])
        parser.add_argument("config", type=Path, metavar="CONFIG", help="the recipe")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, as for train")
        parser.add_argument("--cluster", type=Path, metavar="FILE", help="the cluster's settings (launch/clusters/)")
        parser.add_argument("--nodes", type=whole(1), default=1, help="number of nodes of the job")
        parser.add_argument(
            "--gpus-per-node", type=whole(0), default=0, help="number of GPUs of each node; 0: a run on CPUs"
        )
        parser.add_argument("--time", metavar="[D-]H:M:S", help="time limit of a job; default: the cluster's")
        parser.add_argument("--name", help="name of the job in the queue; default: the name of run_dir")
        parser.add_argument(
            "--max-resubmits", type=whole(0), default=20, help="largest number of submissions after the first one"
        )
        parser.add_argument("--dry-run", action="store_true", help="print exactly what would be submitted")
        parser.add_argument("--detach", action="store_true", help="submit the job and return at once")
        parser.set_defaults(run=_launch, kind=kind)


def _launch(options: argparse.Namespace) -> None:
    from megatron_coreward.config.load import load_config
    from megatron_coreward.launch.job import make_job
    from megatron_coreward.launch.supervise import supervise

    if options.detach and options.kind == "local":
        raise InputError("--detach: a local run ends with its launcher; put the launcher into the background")
    job = make_job(
        load_config(options.config, options.overrides),
        options.name,
        options.nodes,
        options.gpus_per_node,
        options.time,
    )
    _check_packages(options.kind)
    backend = _backend(options.kind, job, options.cluster)
    if job.gpus > job.used_gpus:
        say(
            f"warning: --nodes {job.nodes} --gpus-per-node {job.gpus_per_node}: {job.gpus} GPUs, of which the recipe's "
            f"layout uses {job.used_gpus}",
            sys.stderr,
        )
    if options.dry_run:
        print(backend.preview())
    else:
        supervise(backend, max_resubmits=options.max_resubmits, detach=options.detach)


def _check_packages(kind: str) -> None:
    """Raises InputError if what every backend needs is not here."""
    warnings.filterwarnings("ignore", module="fastapi")  # what nemo-run imports
    try:
        import nemo_run  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"launch {kind} needs nemo-run and psutil, which this Python cannot import ({e}): pip install '.[launch]'"
        ) from None
    logging.getLogger("nemo_run").setLevel(logging.WARNING)


def _backend(kind: str, job: "Job", cluster: Path | None) -> "Backend":
    from megatron_coreward.launch import settings

    if kind == "local":
        from megatron_coreward.launch.local import Local

        return Local(job, settings.load_cluster(settings.LocalCluster, cluster))
    if kind == "slurm":
        from megatron_coreward.launch.slurm import Slurm

        return Slurm(job, settings.load_cluster(settings.SlurmCluster, cluster))
    if kind == "kubernetes":
        from megatron_coreward.launch.kubernetes import Kubernetes

        return Kubernetes(job, settings.load_cluster(settings.KubernetesCluster, cluster))
    from megatron_coreward.launch.skypilot import SkyPilot

    return SkyPilot(job, settings.load_cluster(settings.SkyPilotCluster, cluster))
