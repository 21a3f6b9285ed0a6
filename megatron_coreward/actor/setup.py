"""What an actor rank is built from. Imports without Megatron, so that the driver can make one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_coreward.config.schema import ActorSettings, LossSettings

Weights = Literal["policy", "teacher", "reference"]


@dataclass(frozen=True, slots=True)
class ActorSetup:
    """All that an actor rank is built from."""

    settings: ActorSettings
    loss: LossSettings
    hf_path: Path  # config and tokenizer, and the weights unless `megatron_path` has them
    megatron_path: Path | None
    dtype: Literal["float32", "bfloat16"]
    temperature: float  # of the rollouts; log-probs are of the distribution sampled from
    max_sequence_length: int
    total_updates: int
    seed: int
    teacher: bool  # keep an EMA teacher
    frozen_reference: bool  # keep the starting weights
    skip_nonfinite_gradients: bool = False  # leave an update out whose gradient is not finite, instead of raising
