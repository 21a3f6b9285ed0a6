"""What all parties of a weight sync agree on: how weights travel, between which layouts, in which buckets."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, cast

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.errors import InputError
from megatron_coreward.types import Role
from megatron_coreward.weights.buckets import TensorMeta
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.mapping import hf_tensors

Transport = Literal["shared_memory", "gloo", "ipc", "nccl"]

VLLM_BACKEND = "coreward"  # the name under which vLLM knows the receiving side, whatever the transport


def choose_transport(
    wanted: str, *, gpus: bool, colocated: bool, num_hosts: int, allocator_settings: str = ""
) -> Transport:
    """What `sync.transport` means. Pure.

    Args:
        gpus: whether actors and engines run on GPUs.
        num_hosts: of the cluster.
        allocator_settings: of the environment variable PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF.

    Raises:
        InputError: what was asked for does not reach the engines.
    """
    if wanted in ("ipc", "nccl") and not gpus:
        raise InputError(f"sync.transport: {wanted} needs GPUs; allowed without: auto, shared_memory, gloo")
    if wanted == "ipc" and not colocated:
        raise InputError("sync.transport: ipc needs rollout.placement colocated; use auto or nccl")
    if wanted == "shared_memory" and num_hosts > 1:
        raise InputError(
            f"sync.transport: shared_memory reaches one host, the cluster has {num_hosts}; use auto or gloo"
        )
    if wanted == "auto":
        if gpus:
            chosen: Transport = "ipc" if colocated else "nccl"
        else:
            chosen = "gloo" if num_hosts > 1 else "shared_memory"
    else:
        chosen = cast(Transport, wanted)
    if chosen == "ipc" and "expandable_segments:true" in allocator_settings.lower().replace(" ", ""):
        raise InputError(
            "PYTORCH_ALLOC_CONF: expandable_segments:True gives memory that another process cannot map, which "
            "sync.transport ipc needs; unset it"
        )
    return chosen


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """The same for every weight sync until an engine is replaced; plain data, so that it goes to any process."""

    transport: Transport
    name: str  # unique to the run and to the engines that take part: names what is shared on a host and where all meet
    actor: ActorLayout
    engines: EngineLayout
    dtype: str  # of the tensors, a key of buckets.ITEM_BYTES
    bucket_bytes: int
    timeout_s: float  # for a bucket, and for everybody to appear
    checksums: bool = False  # of every message, compared where it arrives
    roles: tuple[Role, ...] = ("policy", "teacher")  # whose weights are sent under it, as far as the actors have them
    address: str = ""  # of the store at which all parties meet; rank 0 of the actor serves it and fills it in
    port: int = 0

    def at(self, address: str, port: int) -> Self:
        """The same, with the place where everybody meets."""
        return replace(self, address=address, port=port)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        layouts = {"actor": ActorLayout(**data["actor"]), "engines": EngineLayout(**data["engines"])}
        return cls(**(data | layouts | {"roles": tuple(data["roles"])}))


def tensors_to_send(arch: Architecture, dtype: str) -> list[TensorMeta]:
    """Everything that a weight sync brings: the tensors of the HF checkpoint, in its order."""
    return [TensorMeta(name, shape, dtype) for name, shape in hf_tensors(arch).items()]
