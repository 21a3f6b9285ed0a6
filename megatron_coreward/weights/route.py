"""How weights travel from the actor to the engines: what the trainer tells both."""

from dataclasses import dataclass
from typing import Literal

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.buckets import TensorMeta, plan_buckets
from megatron_coreward.weights.layouts import EngineLayout
from megatron_coreward.weights.mapping import hf_tensors

Transport = Literal["shared_memory", "gloo"]


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
