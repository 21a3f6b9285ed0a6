"""The receiving side of a weight transfer: engines of vLLM's weight-transfer interface, one for each way to travel.

vLLM finds them by name through the entry point `vllm.general_plugins` (`register`); nothing of vLLM is patched.
  shared_memory  engines on the host of the actor, on CPU and on GPU, with any tensor parallelism: each worker maps the
                 segment and takes its own shards out of the full tensors.
  gloo           engines on any host: each worker receives its own shards, and nothing else (`weights.gloo`).
  ipc, nccl      from GPU to GPU (`weights.device_receive`).
What follows the arrival of a bucket is the same for all.

Invariants (tests/rollout/test_weight_sync.py):
  1. An update takes every bucket once, in order, and leaves no parameter as it was: a tensor that is missing or that
     the model does not know ends the update with an error.
  2. Nothing refers to a bucket's memory once `update_weights` has returned, so it may be overwritten.
  3. A bucket of another version, or one that a sender has not completed, is refused.
  4. An update that was given up (`NO_BUCKET`, then `finish_weight_update`) leaves an engine that takes the next one.
  5. A tied output layer (lm_head = embed_tokens) computes with the new embedding, and experts with their new weights.

Why 2 takes care: vLLM's layerwise reload keeps the tensors it is given until a layer is complete, and a fused layer
(q, k and v; gate and up) may straddle two buckets. Why 5 takes care: CPU linear layers multiply with a packed copy of
their weight; the reload packs a tied weight again for the embedding only, and the head would go on with the old copy.
Experts have a case of their own (`_forget_expert_kernels`).
"""

import gc
import mmap
import struct
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.weights.buckets import NO_BUCKET, Bucket, SegmentLayout
from megatron_coreward.weights.gloo import Inbox, Session
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import Params
from megatron_coreward.weights.route import ENGINE_BACKENDS
from megatron_coreward.weights.segment import open_segment, tensor_at
from megatron_coreward.weights.send import crc32

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)


@cache  # vLLM may call it more than once in a process, and refuses a second registration
def register() -> None:
    """Entry point: makes the backends known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
    WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
    there = "megatron_coreward.weights.device_receive"
    WeightTransferEngineFactory.register_engine(ENGINE_BACKENDS["ipc"], there, "IpcEngine")
    WeightTransferEngineFactory.register_engine(ENGINE_BACKENDS["nccl"], there, "NcclEngine")


@dataclass
class BucketUpdateInfo(WeightTransferUpdateInfo):
    """The next bucket, which all ranks have written or are about to send; or `NO_BUCKET`."""

    bucket: int
    version: int
    hashes: list[Any] = field(default_factory=list, repr=False)  # `BlockHash`es: [name, bounds, crc32]


class BucketEngine(WeightTransferEngine[InitInfo, BucketUpdateInfo], ABC, Generic[InitInfo]):
    """Loads a model's tensors, bucket by bucket, into one vLLM worker."""

    update_info_cls = BucketUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._buckets: tuple[Bucket, ...] = ()
        self._next_bucket: int | None = None  # None: no update is under way
        self._tied: dict[str, list[str]] = {}  # name of a parameter -> its other names
        self._reloading = False  # layers wait for weights; still so when the update before this one failed

    @abstractmethod
    def _begin(self) -> None:
        """Gets ready for the buckets of an update."""

    @abstractmethod
    def _take(self, bucket: int, version: int) -> tuple[Any, int]:
        """A buffer with the full tensors of a bucket, and the byte where the bucket starts.

        Raises:
            RuntimeError: the bucket is incomplete, or of another version.
        """

    def _give_up(self) -> None:
        """Leaves an update of which nothing more will come. Raises RuntimeError where that is not possible."""

    @abstractmethod
    def _end(self) -> None:
        """Lets go of the memory of an update."""

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Abstract in vLLM 0.26. The senders here are the actor's ranks (`weights.send`)."""
        raise NotImplementedError("weights are sent by the actor's ranks, bucket by bucket")

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if not self._buckets:
            raise RuntimeError("init_weight_transfer_engine was not called: the sender is not known")
        self._put_layers_back()  # of an update that has failed; its weights are overwritten below
        self._begin()
        self._next_bucket = 0
        self._tied = _tied_parameters(self.model)
        self._check_tied_names()
        self._reloading = True
        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception:
            with suppress(Exception):  # the first error is the one to tell; the next update tries again
                self._put_layers_back()  # an engine whose layers have no memory could not even sleep
            raise
        if self.device.type != "cpu":  # the base class synchronizes always, which torch refuses without an accelerator
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdateInfo) -> None:
        """Loads one bucket, and checks after the last one that the model is complete; or gives the update up.

        Raises:
            RuntimeError: the bucket is out of turn, incomplete or damaged, one of its tensors is unknown to the model,
                or, after the last bucket, a layer lacks weights.
        """
        if self._next_bucket is None:
            raise RuntimeError("no weight update is under way")
        if update_info.bucket == NO_BUCKET:
            self._give_up()
            self._next_bucket = NO_BUCKET
            return
        if update_info.bucket != self._next_bucket or update_info.bucket >= len(self._buckets):
            raise RuntimeError(f"bucket {update_info.bucket} arrived, bucket {self._next_bucket} is next")
        bucket = self._buckets[update_info.bucket]
        memory, start = self._take(update_info.bucket, update_info.version)
        self._check_hashes(bucket, memory, start, update_info.hashes)
        lent = self._load(bucket, memory, start)
        if any(ref() is not None for ref in lent.values()):
            gc.collect()
        kept = [name for name, ref in lent.items() if ref() is not None]
        if kept:
            raise RuntimeError(f"vLLM keeps a reference to {kept[0]!r} that would outlive the tensor's memory")
        self._next_bucket += 1
        if self._next_bucket == len(self._buckets):
            self._check_complete()

    def finish_weight_update(self) -> None:
        if not self._buckets or self._next_bucket not in (len(self._buckets), NO_BUCKET):
            raise RuntimeError(f"the update ends after {self._next_bucket} buckets, which are not all")
        self._put_layers_back()
        self._next_bucket = None
        self._end()

    def _put_layers_back(self) -> None:
        """Ends vLLM's reload, if one is under way: layers whose weights have not come get their former memory."""
        if self._reloading:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            self._reloading = False

    def shutdown(self) -> None:
        self._end()

    def _check_hashes(self, bucket: Bucket, memory: Any, start: int, hashes: list[Any]) -> None:
        """Compares what arrived with what was written. Raises RuntimeError naming the first block that differs."""
        if not hashes:
            return
        entries = {entry.meta.name: entry for entry in bucket.entries}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            for name, bounds, expected in hashes:
                tensor = tensor_at(memory, start + entries[name].offset, entries[name].meta)
                if crc32(tensor[tuple(slice(*cut) for cut in bounds)]) != expected:
                    raise RuntimeError(f"block {bounds} of {name!r} is not what its sender wrote")

    def _load(self, bucket: Bucket, memory: Any, start: int) -> dict[str, "weakref.ref[Any]"]:
        """Hands views of the memory to the model, and copies those that it does not use up at once.

        Returns what tells whether views of a tensor still exist: references to the buffers that they hold on to.
        """
        raw = np.frombuffer(memory, np.uint8, bucket.nbytes, start)
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
            copy_waiting(module, first_byte, first_byte + bucket.nbytes)
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

    def _check_tied_names(self) -> None:
        sent = {entry.meta.name for bucket in self._buckets for entry in bucket.entries}
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


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """`SegmentLayout.to_json()` of the sender."""

    segment: str
    tensors: list[Any] = field(repr=False)
    bucket_bytes: int
    num_slots: int
    num_writers: int


class SharedMemoryEngine(BucketEngine[SharedMemoryInitInfo]):
    """Reads the buckets in the slots of a segment (`weights.segment`)."""

    init_info_cls = SharedMemoryInitInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._layout: SegmentLayout | None = None
        self._memory: mmap.mmap | None = None  # mapped for the length of an update, so never that of a former segment

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self._layout = SegmentLayout.from_json(vars(init_info))
        self._buckets = self._layout.buckets

    def _begin(self) -> None:
        assert self._layout is not None
        self._memory = open_segment(self._layout, writable=False)

    def _take(self, bucket: int, version: int) -> tuple[Any, int]:
        assert self._layout is not None
        assert self._memory is not None
        for writer in range(self._layout.num_writers):
            found = struct.unpack_from("<2q", self._memory, self._layout.mark_start(bucket, writer))
            if found != (version, bucket):
                raise RuntimeError(
                    f"rank {writer} left bucket {found[1]} of version {found[0]} in the slot, expected bucket {bucket} "
                    f"of version {version}"
                )
        return self._memory, self._layout.slot_start(bucket)

    def _end(self) -> None:
        self._memory = None


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """`GlooSender.init_info`, with the number of this engine."""

    address: str
    port: int
    timeout_s: float
    actor: dict[str, Any]
    engines: dict[str, Any]
    dtype: str
    bucket_bytes: int
    engine: int


class GlooEngine(BucketEngine[GlooInitInfo]):
    """Receives its worker's blocks in one piece of memory while it loads the bucket before them from another."""

    init_info_cls = GlooInitInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._inbox: Inbox | None = None  # of the sender whose turn it is
        self._inboxes: dict[tuple[str, int], Inbox] = {}

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        meeting = (init_info.address, init_info.port)
        if meeting not in self._inboxes:  # policy and teacher take turns; each has its own connections
            session = Session(
                *meeting,
                timeout_s=init_info.timeout_s,
                actor=ActorLayout(**init_info.actor),
                engines=EngineLayout(**init_info.engines),
                params=Params(read_architecture(Path(self.model_config.model)), init_info.dtype),
                bucket_bytes=init_info.bucket_bytes,
            )
            worker = self.parallel_config.rank % session.engines.num_workers
            self._inboxes[meeting] = Inbox(session, init_info.engine, worker)
        self._inbox = self._inboxes[meeting]
        self._buckets = self._inbox.session.buckets

    def _begin(self) -> None:
        assert self._inbox is not None
        self._inbox.begin()

    def _take(self, bucket: int, version: int) -> tuple[Any, int]:
        assert self._inbox is not None
        return self._inbox.take(bucket, version), 0

    def _end(self) -> None:
        if self._inbox is not None:
            self._inbox.end()

    def shutdown(self) -> None:
        for inbox in self._inboxes.values():
            inbox.close()


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


def copy_waiting(module: torch.nn.Module, start: int, stop: int) -> None:
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
    from vllm.model_executor.layers import attention
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import meta
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    # vLLM 0.26 has other names for both, and no layer whose parameters are larger than what is loaded.
    skipped = getattr(meta, "SKIP_LOAD_TENSORS", None) or meta.SKIP_TENSORS
    deferred = getattr(attention, "is_deferred_attention_layer", None) or (
        lambda layer: isinstance(layer, (attention.Attention, attention.MLAAttention))
    )
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        parameters = [p for key, p in module.named_parameters(recurse=False) if key not in skipped]
        if not info.can_load() or not parameters or deferred(module):
            continue
        expected = sum(getattr(p, "weight_loader_numel", p.numel()) for p in parameters)
        if isinstance(module, VocabParallelEmbedding):
            rows = module.shard_indices.num_org_elements
            expected = sum(p.numel() // p.shape[0] * rows for p in parameters)
        if info.load_numel < expected:
            yield f"{name!r} ({info.load_numel} of {expected} elements)"
