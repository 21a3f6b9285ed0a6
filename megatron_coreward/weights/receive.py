"""The receiving side of a weight transfer through shared memory: an engine of vLLM's weight-transfer interface.

vLLM finds it under the name "shared_memory" through the entry point `vllm.general_plugins` (`register`); nothing of
vLLM is patched. It serves engines on the host of the actor, on CPU and on GPU, with any tensor parallelism: each worker
maps the segment and takes its own shards out of the full tensors.

Invariants (tests/rollout/test_weight_sync.py):
  1. An update takes every bucket once, in order, and leaves no parameter as it was: a tensor that is missing or that
     the model does not know ends the update with an error.
  2. Nothing refers to a slot once `update_weights` has returned, so the slot may be overwritten.
  3. A tied output layer (lm_head = embed_tokens) computes with the new embedding, and experts with their new weights.

Why 2 takes care: vLLM's layerwise reload keeps the tensors it is given until a layer is complete, and a fused layer
(q, k and v; gate and up) may straddle two buckets. Why 3 takes care: CPU linear layers multiply with a packed copy of
their weight; the reload packs a tied weight again for the embedding only, and the head would go on with the old copy.
Experts have a case of their own (`_forget_expert_kernels`).
"""

import gc
import mmap
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_coreward.weights.buckets import Bucket, SegmentLayout
from megatron_coreward.weights.segment import open_segment, tensor_at

BACKEND = "shared_memory"


@cache  # vLLM may call it more than once in a process, and refuses a second registration
def register() -> None:
    """Entry point: makes the backend known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """`SegmentLayout.to_json()` of the sender."""

    segment: str
    tensors: list[Any] = field(repr=False)
    bucket_bytes: int
    num_slots: int

    @property
    def layout(self) -> SegmentLayout:
        return SegmentLayout.from_json(vars(self))


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """The next bucket, which all ranks have written."""

    bucket: int


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads the buckets of a segment into the model of one vLLM worker."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layout: SegmentLayout | None = None
        self._memory: mmap.mmap | None = None  # mapped for the length of an update, so never that of a former segment
        self._next_bucket = 0
        self._tied: dict[str, list[str]] = {}  # name of a parameter -> its other names
        self._reloading = False  # layers wait for weights; still so when the update before this one failed

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self._layout = init_info.layout

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._layout is None:
            raise RuntimeError("init_weight_transfer_engine was not called: the segment is not known")
        if self._reloading:  # puts the layers back; the weights of a failed update are overwritten below
            finalize_layerwise_reload(self.model, self.model_config)
            self._reloading = False
        self._memory = open_segment(self._layout, writable=False)
        self._next_bucket = 0
        self._tied = _tied_parameters(self.model)
        self._check_tied_names(self._layout)
        self._reloading = True
        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronizes always, which torch refuses without an accelerator
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Loads one bucket, and checks after the last one that the model is complete.

        Raises:
            RuntimeError: the bucket is out of turn, one of its tensors is unknown to the model, or, after the last
                bucket, a layer lacks weights.
        """
        if self._layout is None or self._memory is None:
            raise RuntimeError("no weight update is under way")
        if update_info.bucket != self._next_bucket:
            raise RuntimeError(f"bucket {update_info.bucket} arrived, bucket {self._next_bucket} is next")
        bucket = self._layout.bucket(update_info.bucket)
        lent = self._load(bucket, self._memory, self._layout.slot_start(update_info.bucket))
        if any(ref() is not None for ref in lent.values()):
            gc.collect()
        kept = [name for name, ref in lent.items() if ref() is not None]
        if kept:
            raise RuntimeError(f"vLLM keeps a reference to {kept[0]!r} that would outlive the tensor's slot")
        self._next_bucket += 1
        if self._next_bucket == len(self._layout.buckets):
            self._check_complete()

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._layout is None or self._next_bucket != len(self._layout.buckets):
            raise RuntimeError(f"the update ends after {self._next_bucket} buckets, which are not all")
        finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = False
        self._memory = None

    def shutdown(self) -> None:
        self._memory = None

    def _load(self, bucket: Bucket, memory: mmap.mmap, slot: int) -> dict[str, "weakref.ref[Any]"]:
        """Hands views of the slot to the model, and copies those that it does not use up at once.

        Returns what tells whether views of a tensor still exist: references to the buffers that they hold on to.
        """
        raw = np.frombuffer(memory, np.uint8, bucket.nbytes, slot)
        first_byte = raw.ctypes.data
        lent: dict[str, weakref.ref[Any]] = {}
        weights: list[tuple[str, torch.Tensor]] = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes
            for entry in bucket.entries:
                name = entry.meta.name
                buffer = raw[entry.offset : entry.offset + entry.meta.nbytes]
                lent[name] = weakref.ref(buffer)
                tensor = tensor_at(buffer, 0, entry.meta)
                # A tied parameter is loaded under each of its names, as if it were untied, so that each of its layers
                # is processed; the reload puts the shared parameter itself back into all of them.
                weights += [(n, tensor) for n in (name, *self._tied.get(name, ()))]
        self._load_named(weights)
        for module in self.model.modules():
            _copy_waiting(module, first_byte, first_byte + bucket.nbytes)
        return lent

    def _load_named(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        # vLLM's loader raises for names that the model does not have, except that it skips biases (some quantized
        # checkpoints have superfluous ones). On its own, a bias that was skipped shows.
        biases = [pair for pair in weights if pair[0].endswith(".bias")]
        self.model.load_weights([pair for pair in weights if not pair[0].endswith(".bias")])
        for pair in biases:
            loaded = self.model.load_weights([pair])
            if loaded is not None and not loaded:
                raise RuntimeError(f"the model has no parameter for {pair[0]!r}")

    def _check_tied_names(self, layout: SegmentLayout) -> None:
        sent = {meta.name for meta in layout.metas}
        for name, others in self._tied.items():
            if name not in sent:
                raise RuntimeError(f"{name!r}, to which {others[0]!r} is tied, is not among the tensors that are sent")
            twice = sent.intersection(others)
            if twice:
                raise RuntimeError(f"{min(twice)!r} is tied to {name!r} in this engine: only {name!r} may be sent")

    def _check_complete(self) -> None:
        lacking = list(_incomplete_layers(self.model))
        if lacking:
            raise RuntimeError(f"{len(lacking)} layers did not get all their weights, first {lacking[0]}")


def _tied_parameters(model: torch.nn.Module) -> dict[str, list[str]]:
    """Parameters that several layers share: the first name -> the other names."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                tied.setdefault(known, []).append(name)
    return tied


def _forget_expert_kernels(model: torch.nn.Module) -> None:
    """Makes expert layers set up their kernel anew when their weights have arrived.

    CPU kernels multiply with packed weights. vLLM 0.32 packs expert weights only while it sets up the kernel, and at a
    reload keeps the kernel that there is (on GPUs, captured graphs refer to it): unpacked weights would be taken for
    packed ones.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _copy_waiting(module: torch.nn.Module, start: int, stop: int) -> None:
    """Copies the tensors at addresses [start, stop) that a layer holds until the rest of its weights arrives."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for _, call in get_layerwise_info(module).loaded_weights:
        for argument, value in call.arguments.items():
            if isinstance(value, torch.Tensor) and start <= value.data_ptr() < stop:
                call.arguments[argument] = value.clone()


def _incomplete_layers(model: torch.nn.Module) -> Iterator[str]:
    """Layers that still wait for elements of their parameters, with the numbers of elements.

    A complete layer is processed at once and waits no more, with one exception: rows that pad the vocabulary are not
    in the checkpoint, and such a layer waits for the end of the update.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        parameters = [p for key, p in module.named_parameters(recurse=False) if key not in SKIP_LOAD_TENSORS]
        if not info.can_load() or not parameters or is_deferred_attention_layer(module):
            continue
        expected = sum(get_tensor_load_numel(p) for p in parameters)
        if isinstance(module, VocabParallelEmbedding):
            rows = module.shard_indices.num_org_elements
            expected = sum(p.numel() // p.shape[0] * rows for p in parameters)
        if info.load_numel < expected:
            yield f"{name!r} ({info.load_numel} of {expected} elements)"
