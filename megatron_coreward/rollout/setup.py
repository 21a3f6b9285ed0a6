"""What a rollout engine is built from. Imports without vLLM, so that the driver can make one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """All that a rollout engine is built from."""

    model_path: Path  # directory with config, generation config and tokenizer
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int  # tokens of a prompt and its answer together
    tensor_parallel: int = 1
    max_num_seqs: int = 256  # sequences that are decoded at once
    kv_cache_gib: float = 1.0  # key-value cache of each rank, without a GPU
    gpu_memory_utilization: float = 0.5  # share of a GPU's memory that the engine takes
    cpu_threads: int = 1  # of each rank, without a GPU
    seed: int = 0
    quantization: Literal["fp8"] | None = None  # of the weights as they are loaded, with a GPU; they travel unquantised
    cuda_graphs: bool = True  # decode with captured graphs, with a GPU
    return_experts: bool = False  # with the samples whose log-probs are asked for, those that each token went to
    own_weights: int | None = None  # sample from the directory's weights, under this version; None: await an update
