"""vLLM's own reload of a whole checkpoint, in the workers of an engine: what a weight sync is compared with."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def reload(worker: Any, checkpoint: Path) -> None:
    """Loads every tensor whole, as vLLM does it; with what vLLM 0.32 needs to be set on CPU: a tied head is loaded
    under its own name too, and experts set their kernels up from the new weights."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    from megatron_coreward.weights.receivers.landing import tied_parameters

    engine = worker.weight_transfer_engine
    tensors = load_file(checkpoint / "model.safetensors")
    for name, others in tied_parameters(engine.model).items():
        tensors |= dict.fromkeys(others, tensors[name])
    for module in engine.model.modules():
        if getattr(getattr(module, "quant_method", None), "moe_kernel", None) is not None:
            module.quant_method.moe_kernel = None
    initialize_layerwise_reload(engine.model)
    engine.model.load_weights(iter(tensors.items()))
    finalize_layerwise_reload(engine.model, engine.model_config)


def spoil(worker: Any) -> None:
    """Overwrites every live parameter, so that none can be right by chance."""
    for parameter in worker.weight_transfer_engine.model.parameters():
        parameter.data.fill_(torch.nan)


def parameters(worker: Any) -> dict[str, bytes]:
    """Every live parameter of a worker, bit for bit."""
    named = worker.weight_transfer_engine.model.named_parameters()
    return {name: p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, p in named}
