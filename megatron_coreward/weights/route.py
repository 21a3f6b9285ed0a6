"""How weights travel from the actor to the engines: what the trainer tells both."""

from dataclasses import dataclass
from typing import Literal, cast

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import TensorMeta, plan_buckets
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.mapping import hf_tensors

Transport = Literal["shared_memory", "gloo", "ipc", "nccl"]

# Names under which vLLM knows the receiving engines; `ipc` and `nccl` are vLLM's own.
ENGINE_BACKENDS: dict[Transport, str] = {
    "shared_memory": "shared_memory",
    "gloo": "gloo",
    "ipc": "coreward_ipc",
    "nccl": "coreward_nccl",
}
MEETING: frozenset[Transport] = frozenset({"gloo", "nccl"})  # everybody joins a group, anew after one was replaced


def choose_transport(wanted: str, *, gpus: bool, colocated: bool, num_hosts: int) -> Transport:
    """What `sync.transport` means. Pure.

    Args:
        gpus: whether actors and engines run on GPUs.
        num_hosts: of the cluster.

    Raises:
        InputError: what was asked for does not reach the engines.
    """
    if wanted in ("ipc", "nccl") and not gpus:
        raise InputError(f"sync.transport: {wanted} needs GPUs; allowed without: auto, shared_memory, gloo")
    if wanted == "shared_memory" and num_hosts > 1:
        raise InputError(
            f"sync.transport: shared_memory reaches one host, the cluster has {num_hosts}; use auto or gloo"
        )
    if wanted == "auto":
        if gpus:
            return "ipc" if colocated else "nccl"
        return "gloo" if num_hosts > 1 else "shared_memory"
    return cast(Transport, wanted)


@dataclass(frozen=True, slots=True)
class Route:
    """The same for every publication of a run."""

    transport: Transport
    run_id: str  # makes names of shared memory unique on a host
    bucket_bytes: int
    engines: EngineLayout
    timeout_s: float  # for a message, where there are messages

    def num_buckets(self, arch: Architecture, dtype: str) -> int:
        return len(plan_buckets(tensors_to_send(arch, dtype), self.bucket_bytes))


def tensors_to_send(arch: Architecture, dtype: str) -> list[TensorMeta]:
    """Everything that a publication brings, in order: the tensors of the HF checkpoint."""
    return [TensorMeta(name, shape, dtype) for name, shape in hf_tensors(arch).items()]
