"""GPUs a plan can be made for, and what a plan assumes of what nobody can know: efficiencies, lengths, overheads."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megatron_coreward.errors import InputError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its maker specifies it (dense rates, no sparsity; links one way)."""

    name: str
    memory_bytes: int  # that a driver reports, before any process is on it
    bf16_flops: float  # a second, tensor cores, dense
    hbm_bytes_s: float
    nvlink_bytes_s: float  # to the other GPUs of its node
    network_bytes_s: float  # its share of the node's network
    capability: tuple[int, int]  # compute capability, which says what kernels it has


# NVIDIA data sheets "A100 Tensor Core GPU" (80 GB SXM), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM):
# rates with sparsity halved, NVLink's total halved for one direction. Network: one port a GPU in DGX A100 (200 Gb/s
# HDR) and DGX H100/H200 (400 Gb/s NDR), system user guides. Memory: MiB as nvidia-smi shows it for these boards.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 81_920 * 2**20, 312e12, 2.039e12, 300e9, 25e9, (8, 0)),
        Gpu("h100", 81_559 * 2**20, 989.4e12, 3.35e12, 450e9, 50e9, (9, 0)),
        Gpu("h200", 143_771 * 2**20, 989.4e12, 4.8e12, 450e9, 50e9, (9, 0)),
    )
}


def find_gpu(name: str) -> Gpu:
    """Raises InputError for a GPU that the table does not know."""
    if name not in GPUS:
        raise InputError(f"--gpu: {name!r} is not known; allowed: {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan takes for granted. Every one can be set.

    The efficiencies of compute and HBM were chosen by three published step times of a comparable system
    (docs/planning.md); nothing here was measured on this project's own runs.
    """

    gpus_per_node: int = 8
    mean_prompt: float = 0.3  # mean tokens of a prompt, as a share of data.max_prompt_tokens
    mean_response: float = 0.4  # mean tokens of a response, as a share of rollout.max_response_tokens
    matmul_efficiency: float = 0.45  # of the peak rate, in training and scoring, of products over many tokens
    half_rate_tokens: float = 128.0  # tokens of a product at which it reaches half of that efficiency
    layer_overhead_s: float = 1e-4  # of a layer for each pass of a micro-batch: launches, and kernels too short to fill
    decode_efficiency: float = 0.5  # of HBM bandwidth, while decoding
    link_efficiency: float = 0.7  # of NVLink and network
    iteration_overhead_s: float = 0.003  # of an engine for one decoding step: scheduling, sampling, launches
    sequence_overhead_s: float = 1e-5  # of an engine for every sequence of a decoding step
    allreduce_latency_s: float = 1e-5  # of a small all-reduce between tensor-parallel engine workers
    message_overhead_s: float = 5e-5  # of a rank or worker for one message of a weight sync (docs/weight_sync.md)
    connection_mib: float = 10.0  # of GPU memory for a connection of the weight sync's group
    packing: float = 0.95  # tokens in a micro-batch over its budget
    expert_imbalance: float = 1.2  # tokens of the busiest expert-parallel rank over the mean
    runtime_gib: float = 2.0  # CUDA context, NCCL and kernel workspaces of a process
    engine_gib: float = 3.0  # activations, graphs and workspaces of an engine worker beside weights and cache
    asleep_gib: float = 1.5  # what an engine worker keeps while it sleeps
    fragmentation: float = 0.05  # allocator's loss, as a share of what is allocated

    @property
    def runtime_bytes(self) -> int:
        return int(self.runtime_gib * GIB)


SHARES = frozenset(
    {
        "mean_prompt",
        "mean_response",
        "matmul_efficiency",
        "decode_efficiency",
        "link_efficiency",
        "packing",
        "fragmentation",
    }
)


def assume(overrides: Sequence[str]) -> Assumptions:
    """The defaults with `key=value` changes.

    Raises:
        InputError: a key that is none, or a value that is no positive number, no whole one, or no share.
    """
    changes: dict[str, float] = {}
    known = {field.name: field.type for field in fields(Assumptions)}
    for override in overrides:
        key, _, text = override.partition("=")
        if key not in known:
            raise InputError(f"--assume {override}: unknown key {key!r}; allowed: {', '.join(known)}")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < float("inf"):
            raise InputError(f"--assume {override}: expected {key}=NUMBER, above 0")
        if known[key] is int and value != int(value):
            raise InputError(f"--assume {override}: expected a whole number")
        if key in SHARES and value > 1:
            raise InputError(f"--assume {override}: a share; allowed: above 0, at most 1")
        changes[key] = int(value) if known[key] is int else value
    return replace(Assumptions(), **changes)  # type: ignore[arg-type]
