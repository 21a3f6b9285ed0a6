"""Layers whose weights vLLM lays out in another way after they were loaded: CPU kernels multiply with packed copies,
FP8 layers with quantised ones.

Such a layer gets parameters in the form of the checkpoint, the slices land there, and when the last one has come vLLM's
own layerwise reload makes of them what its kernels want. Everything else lands in the live parameters.

These functions of vLLM are no public interface: what is missing is named when the engine starts to receive.
"""

from collections.abc import Iterator
from typing import Any

import torch

from megatron_coreward.errors import RunError


def layerwise() -> Any:
    """vLLM's module of the layerwise reload.

    Raises:
        RunError: this version of vLLM does not have what is used of it.
    """
    import vllm
    from vllm.model_executor.model_loader.reload import layerwise, meta

    used = {
        layerwise: ("get_layerwise_info", "initialize_layerwise_reload", "finalize_layerwise_reload"),
        meta: ("restore_layer_on_meta",),
    }
    lacking = [name for module, names in used.items() for name in names if not hasattr(module, name)]
    if not hasattr(layerwise, "_layerwise_process"):
        lacking.append("_layerwise_process")
    if lacking:
        raise RunError(
            f"vLLM {vllm.__version__} has no {', '.join(lacking)} in its layerwise reload; weight syncs work with "
            "0.26 to 0.33"
        )
    return layerwise


def model_format(module: torch.nn.Module) -> None:
    """Gives a module's parameters the form that vLLM's loaders expect, on the meta device."""
    from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta

    restore_layer_on_meta(module, layerwise().get_layerwise_info(module))


def is_attention(module: torch.nn.Module) -> bool:
    """Whether vLLM processes a module after all others; its parameters are no weights."""
    from vllm.model_executor.layers import attention

    is_deferred = getattr(attention, "is_deferred_attention_layer", None)  # since 0.30
    if is_deferred is not None:
        return bool(is_deferred(module))
    return isinstance(module, (attention.Attention, attention.MLAAttention))


class Relayout:
    """One layer, from its first slice to its last."""

    def __init__(self, name: str, module: torch.nn.Module, model_config: Any) -> None:
        self._name, self._module, self._model_config = name, module, model_config
        self._under_way = False

    def begin(self, scratch: "Scratch") -> None:
        """Gives the layer parameters in the form of the checkpoint; its own ones wait."""
        if self._module_is_packed_experts():
            # vLLM packs expert weights for CPU kernels only while it sets up the kernel, and at a reload keeps the
            # kernel that there is (on GPUs, captured graphs refer to it): unpacked weights would be taken for packed.
            self._module.quant_method.moe_kernel = None  # type: ignore[union-attr]
        layerwise().initialize_layerwise_reload(self._module)
        self._under_way = True
        for key, parameter in list(self._module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                scratch.materialize(self._module, key, parameter)

    def _module_is_packed_experts(self) -> bool:
        method: Any = getattr(self._module, "quant_method", None)
        on_cpu = all(p.device.type == "cpu" for p in self._module.parameters(recurse=False))
        return on_cpu and getattr(method, "moe_kernel", None) is not None

    def finish(self) -> None:
        """All slices have landed: lets vLLM lay them out, into the layer's own parameters."""
        vllm_reload = layerwise()
        vllm_reload._layerwise_process(self._module, vllm_reload.get_layerwise_info(self._module))
        self._under_way = False

    def put_back(self) -> None:
        """Gives the layer its own parameters back, as they were."""
        if self._under_way:
            layerwise().finalize_layerwise_reload(self._module, self._model_config)
            self._under_way = False


class Scratch:
    """Memory for parameters in the form of the checkpoint. Layers of one shape use it one after the other: new pages
    for every layer would take about as long as the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lent: dict[int, list[torch.Tensor]] = {}

    def materialize(self, module: torch.nn.Module, key: str, meta: torch.Tensor) -> None:
        """Puts a parameter with memory in the place of one without."""
        nbytes = meta.numel() * meta.element_size()
        free = self._free.setdefault(nbytes, [])
        memory = free.pop() if free else torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._lent.setdefault(id(module), []).append(memory)
        value = memory.view(meta.dtype).as_strided(meta.size(), meta.stride())
        value.__class__ = meta.__class__  # as vLLM does
        value.__dict__ = meta.__dict__.copy()
        setattr(module, key, value)

    def take_back(self, module: torch.nn.Module) -> None:
        """The layer has been laid out. Memory to which something of it still refers is not used again."""
        for memory in self._lent.pop(id(module), []):
            storage = memory.untyped_storage()
            if torch._C._storage_Use_Count(storage._cdata) <= 2:  # `memory` and `storage`  # type: ignore[attr-defined]
                self._free[memory.nbytes].append(memory)

    def clear(self) -> None:
        """Lets go of all memory."""
        self._free.clear()
        self._lent.clear()


def packs_copies(module: torch.nn.Module) -> bool:
    """Whether a layer may compute with packed copies, beside parameters that look as they were loaded: on CPU."""
    return any(p.device.type == "cpu" for p in module.parameters(recurse=False))


def keeps_layout(name: str, module: torch.nn.Module, model_config: Any) -> bool:
    """Whether a layer computes with its weights as they were loaded, found out by loading others.

    The layer's weights are lost: for a layer that is about to get new ones.
    """
    method: Any = getattr(module, "quant_method", None)
    if method is None:
        return True
    if packs_copies(module):
        return False
    scratch, relayout = Scratch(next(module.parameters(recurse=False)).device), Relayout(name, module, model_config)
    relayout.begin(scratch)
    try:
        loaded = {}
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                for rows, pattern in _patterned(parameter.data):
                    rows.copy_(pattern)
                loaded[key] = parameter.shape, parameter.dtype
        relayout.finish()
    finally:
        relayout.put_back()
    own = dict(module._parameters)
    return all(
        (found := own.get(key)) is not None
        and (found.shape, found.dtype) == wanted
        and all(torch.equal(rows, pattern) for rows, pattern in _patterned(found.data))
        for key, wanted in loaded.items()
    )


_COMPARED_AT_A_TIME = 2**20  # elements: a pattern takes many times the memory of the weights, which may fill a GPU


def _patterned(weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few rows of the weights at a time, and numbers of their own to load into them, in their dtype."""
    rows = weights if weights.dim() else weights.view(1)
    row = max(1, rows[:1].numel())
    step = max(1, _COMPARED_AT_A_TIME // row)
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        numbers = torch.arange(first * row, first * row + part.numel(), device=part.device)
        yield part, numbers.remainder(251).view(part.shape).to(part.dtype)
