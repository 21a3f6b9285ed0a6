"""What megatron-core 0.16 needs in order to run without CUDA: the one place where a dependency is patched.

Call `install()` before `megatron` is first imported, in a process that has no GPU; it does nothing if CUDA is
available. Every replacement names its cause. All of it can go when megatron-core takes its device from
`torch.accelerator` instead of naming CUDA.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

_installed = False


class _NoStream:
    """Stands for a CUDA stream or event: nothing runs asynchronously on CPU, so there is nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_NoStream"]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> "_NoStream":
        return self

    def __exit__(self, *exc: object) -> None: ...


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


def _import_megatron() -> None:
    """Megatron's first import, without two things that it brings and that take two fifths of a rank's start.

    `megatron.core.jit` decorates its fused kernels with torch.compile, which imports torch's compilers; without CUDA
    fusions are off, and nobody calls these kernels. `megatron.core.inference` imports W&B wherever it is installed.
    """
    compile_, module = torch.compile, "wandb"

    def as_it_is(function: Any = None, **settings: Any) -> Any:
        return (lambda later: later) if function is None else function

    hides = module not in sys.modules
    try:
        setattr(torch, "compile", as_it_is)  # noqa: B010  (mypy: a name of a module)
        if hides:
            sys.modules[module] = None  # type: ignore[assignment]  # importing it raises ImportError
        for name in ("core", "core.distributed", "core.models.gpt", "core.optimizer", "core.dist_checkpointing"):
            importlib.import_module(f"megatron.{name}")
    finally:
        setattr(torch, "compile", compile_)  # noqa: B010
        if hides:
            del sys.modules[module]


def _let_experts_do_without_transformer_engine() -> None:
    """0.16.1 leaves the name undefined, and the router reads it."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def install() -> None:
    """Makes megatron-core run on CPU tensors and gloo, and on any device without Transformer Engine. Idempotent."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        _let_experts_do_without_transformer_engine()
        return
    _installed = True
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    tensor_class: Any = torch.Tensor
    module: Any = torch

    # Devices: schedules, optimizer and P2P buffers are made on torch.cuda.current_device() or device="cuda".
    cuda.current_device = lambda: cpu
    for name in ("tensor", "zeros", "ones", "empty"):
        setattr(module, name, _on_cpu(getattr(torch, name)))
    tensor_class.cuda = lambda self, *args, **kwargs: self

    # Streams and events: overlap of communication and memory bookkeeping.
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    tensor_class.record_stream = lambda self, *args: None

    # Random state: the tensor-parallel RNG tracker forks the CUDA generator; on CPU it forks the default one.
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed

    # DistributedOptimizer and gradient clipping distinguish dtypes by the name of the CUDA tensor type.
    plain_type = torch.Tensor.type

    def type_with_cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return str(plain_type(self)).replace("torch.", "torch.cuda.", 1)

    tensor_class.type = type_with_cuda_name

    _import_megatron()
    import megatron.core.tensor_parallel.random as megatron_random

    # The tracker reads the generator of a CUDA device by index.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _let_experts_do_without_transformer_engine()
