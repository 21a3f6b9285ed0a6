"""Process groups of the actor: which rank this is, along every axis of the layout."""

import datetime
import os
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_coreward.config.schema import ActorSettings
from megatron_coreward.weights.meeting import own_address
from megatron_coreward.weights.open_files import allow_connections

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class ParallelRanks:
    """This rank's place in the layout; `layout` order is Megatron's: TP fastest, then CP, EP within DP, PP slowest."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    copy_rank: int  # among the ranks with the same parameters: data-parallel and context-parallel ones
    num_copies: int
    ep_rank: int
    ep_size: int
    expert_tp_rank: int
    expert_tp_size: int
    expert_dp_rank: int
    expert_dp_size: int


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def initialize(settings: ActorSettings, rank: int, address: str, port: int, seed: int) -> ParallelRanks:
    """Joins the process group at `address:port` (NCCL with GPUs, else gloo) and lays Megatron's groups over it.

    Raises:
        RunError: this process may not open as many connections as there are ranks.
    """
    allow_connections(settings.world_size)
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    interface = _interface_of(own_address(address, port))
    if interface is not None:  # gloo asks the host's name, which may stand for loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(settings.cpu_threads)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=settings.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_parallel,
        pipeline_model_parallel_size=settings.pipeline_parallel,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline if settings.virtual_pipeline > 1 else None,
        context_parallel_size=settings.context_parallel,
        expert_model_parallel_size=settings.expert_parallel,
        expert_tensor_parallel_size=settings.expert_tensor_parallel,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
    )
    model_parallel_cuda_manual_seed(seed)
    return ParallelRanks(
        rank=rank,
        world_size=settings.world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=settings.tensor_parallel,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=settings.pipeline_parallel,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=settings.data_parallel,
        copy_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        num_copies=settings.data_parallel * settings.context_parallel,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=settings.expert_parallel,
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        expert_dp_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def _interface_of(address: str) -> str | None:
    """The network interface that has an address on this node."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None


def shutdown() -> None:
    """Leaves all groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
