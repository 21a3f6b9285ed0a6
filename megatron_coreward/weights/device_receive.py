"""The engines' end of `weights.device`: buckets arrive on the GPU, and are loaded like those of any other transport.

They are engines of vLLM's weight-transfer interface, registered beside vLLM's own `ipc` and `nccl`. Those take what
comes: they know neither the order, the version and the end of an update, nor whether a layer got all its weights. Here
everything that `weights.receive` checks stays checked; the rendezvous and the communicator of NCCL are vLLM's.

Invariants (tests/weights/test_device_receive.py):
  1. A bucket of another version, or one that was not completed, is refused.
  2. Nothing refers to a slot once `update_weights` has returned, so it may be filled again.
"""

import weakref
from abc import ABC
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from megatron_coreward.weights import device
from megatron_coreward.weights.buckets import Bucket, TensorMeta, plan_buckets
from megatron_coreward.weights.receive import BucketEngine, copy_waiting
from megatron_coreward.weights.send import crc32


@dataclass
class DeviceInitInfo(WeightTransferInitInfo):
    """`DeviceSender.init_info`."""

    tensors: list[Any] = field(repr=False)
    bucket_bytes: int


InitInfo = TypeVar("InitInfo", bound=DeviceInitInfo)


class DeviceEngine(BucketEngine[InitInfo], ABC, Generic[InitInfo]):
    """Loads buckets out of device memory."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        metas = [TensorMeta(name, tuple(shape), dtype) for name, shape, dtype in init_info.tensors]
        self._buckets = plan_buckets(metas, init_info.bucket_bytes)

    def _check_mark(self, memory: torch.Tensor, bucket: int, version: int) -> None:
        found = device.read_mark(memory, self._buckets[bucket].nbytes)
        if found != (version, bucket):
            raise RuntimeError(
                f"the sender left bucket {found[1]} of version {found[0]} in the slot, expected bucket {bucket} of "
                f"version {version}"
            )

    def _load(self, bucket: Bucket, memory: torch.Tensor, start: int) -> dict[str, "weakref.ref[Any]"]:
        """Hands views to the model and copies those that wait for the rest of a layer; nobody else keeps them."""
        weights = []
        for entry in bucket.entries:
            tensor = device.tensor_in(memory[start:], entry)
            weights += [(name, tensor) for name in (entry.meta.name, *self._tied.get(entry.meta.name, ()))]
        self._load_named(weights)
        first = memory.data_ptr() + start
        for module in self.model.modules():
            copy_waiting(module, first, first + bucket.nbytes)
        return {}

    def _check_hashes(self, bucket: Bucket, memory: torch.Tensor, start: int, hashes: list[Any]) -> None:
        entries = {entry.meta.name: entry for entry in bucket.entries}
        for name, bounds, expected in hashes:
            part = device.tensor_in(memory[start:], entries[name])[tuple(slice(*cut) for cut in bounds)]
            if crc32(part.cpu()) != expected:
                raise RuntimeError(f"block {bounds} of {name!r} is not what its sender wrote")


@dataclass
class IpcInitInfo(DeviceInitInfo):
    """`IpcSender.init_info`."""

    handles: dict[str, Any] = field(repr=False)  # name of a GPU -> what its actor rank exported
    slot_bytes: int


class IpcEngine(DeviceEngine[IpcInitInfo]):
    """Reads the slots of the actor rank on its own GPU."""

    init_info_cls = IpcInitInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._handle: Any = None
        self._memory: torch.Tensor | None = None  # mapped once: each export is counted, and released at the end
        self._slot_bytes = 0

    def init_transfer_engine(self, init_info: IpcInitInfo) -> None:
        super().init_transfer_engine(init_info)
        gpu = device.gpu_name(self.device)
        if gpu not in init_info.handles:
            raise RuntimeError(
                f"no actor rank is on GPU {gpu} of this engine, but on {', '.join(sorted(init_info.handles))}: "
                "sync.transport ipc needs an actor rank on every engine's GPU"
            )
        self._slot_bytes, handle = init_info.slot_bytes, init_info.handles[gpu]
        if handle != self._handle:  # policy and teacher share one
            self._memory, self._handle = device.import_memory(handle, self.device), handle

    def _begin(self) -> None: ...

    def _take(self, bucket: int, version: int) -> tuple[Any, int]:
        assert self._memory is not None
        start = bucket % device.NUM_SLOTS * self._slot_bytes
        memory = self._memory[start : start + self._slot_bytes]
        self._check_mark(memory, bucket, version)
        return memory, 0

    def _end(self) -> None: ...

    def shutdown(self) -> None:
        self._memory = self._handle = None


@dataclass
class NcclInitInfo(DeviceInitInfo):
    """`NcclSender.init_info`, with the number of this engine."""

    address: str
    port: int
    size: int
    engine: int


class NcclEngine(DeviceEngine[NcclInitInfo]):
    """Receives the next bucket on a thread of its own while one is loaded."""

    init_info_cls = NcclInitInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._thread = ThreadPoolExecutor(1, "weights")
        self._groups: dict[tuple[str, int], Any] = {}  # of policy and teacher
        self._meeting: NcclInitInfo | None = None
        self._slots: list[torch.Tensor] = []
        self._arriving: Future[torch.Tensor] | None = None

    def init_transfer_engine(self, init_info: NcclInitInfo) -> None:
        super().init_transfer_engine(init_info)
        self._meeting = init_info

    def _begin(self) -> None:
        if self._arriving is not None:
            raise RuntimeError("a weight update over nccl failed before; this engine has to be started anew")
        size = max(bucket.nbytes for bucket in self._buckets) + device.MARK_BYTES
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(device.NUM_SLOTS)]
        self._arriving = self._thread.submit(self._receive, 0)

    def _take(self, bucket: int, version: int) -> tuple[Any, int]:
        assert self._arriving is not None
        memory = self._arriving.result()
        self._check_mark(memory, bucket, version)
        if bucket + 1 < len(self._buckets):
            self._arriving = self._thread.submit(self._receive, bucket + 1)
        return memory, 0

    def _give_up(self) -> None:
        raise RuntimeError("a weight update over nccl was given up; this engine has to be started anew")

    def _receive(self, bucket: int) -> torch.Tensor:
        assert self._meeting is not None
        to = self._meeting
        if (to.address, to.port) not in self._groups:
            workers = self.parallel_config.world_size
            rank = 1 + to.engine * workers + self.parallel_config.rank % workers
            self._groups[to.address, to.port] = device.join_nccl(to.address, to.port, rank, to.size, self.device)
        memory = self._slots[bucket % device.NUM_SLOTS][: self._buckets[bucket].nbytes + device.MARK_BYTES]
        device.broadcast(self._groups[to.address, to.port], memory)
        return memory

    def _end(self) -> None:
        self._arriving, self._slots = None, []

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._groups.clear()
