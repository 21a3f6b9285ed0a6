"""vLLM's end of a weight sync: an engine of vLLM's weight-transfer interface, the same for all transports.

vLLM finds it through the entry point `vllm.general_plugins` (`register`); nothing of vLLM is patched. One update is one
call: the worker loops over the buckets by itself, and each slice is copied into the place that was recorded for it.

Invariants (tests/rollout/test_weight_sync.py):
  1. After an update every parameter has the weights that were sent; a tied output layer (lm_head = embed_tokens) and
     experts compute with them too.
  2. An update that failed leaves an engine that takes the next one. What went wrong is asked for (`failure_of`), never
     raised within vLLM: vLLM would leave the replies of the other tensor-parallel workers unread.
  3. Nothing refers to a bucket's memory once the next bucket is asked for.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import Index, TensorMeta
from megatron_coreward.weights.meeting import give_up
from megatron_coreward.weights.receivers import Receiver, open_receiver
from megatron_coreward.weights.receivers.landing import (
    Landings,
    check_against_plan,
    record,
    tied_parameters,
)
from megatron_coreward.weights.receivers.relayout import Relayout, Scratch, is_attention, keeps_layout, model_format
from megatron_coreward.weights.schedule import Part
from megatron_coreward.weights.spec import VLLM_BACKEND, TransferSpec


@cache  # vLLM may call it more than once in a process, and refuses a second registration
def register() -> None:
    """Entry point: makes the engine known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(VLLM_BACKEND, __name__, "CorewardEngine")


@dataclass
class CorewardInitInfo(WeightTransferInitInfo):
    """A `TransferSpec` as plain data, and the number of this engine."""

    spec: dict[str, Any] = field(repr=False)
    engine: int


@dataclass
class CorewardUpdateInfo(WeightTransferUpdateInfo):
    """The weights that are about to come."""

    version: int


class _Copy(NamedTuple):
    """A slice of a message and its place in a parameter."""

    first: int  # element of the message's parts
    shape: tuple[int, ...]  # of the part
    slices: Index | None  # of the part, if it lands in several places
    module: int
    parameter: str
    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Layer:
    """A module that gets weights."""

    def __init__(self, name: str, module: torch.nn.Module, relayout: Relayout | None) -> None:
        self.name, self.module, self.relayout = name, module, relayout
        self.num_copies = 0  # of an update
        self.left = 0  # copies of the update that is under way


class Places:
    """Where everything lands in a model; found out once."""

    def __init__(self, model: torch.nn.Module, model_config: Any, metas: Sequence[TensorMeta]) -> None:
        """Raises RunError if vLLM does more with weights than copy them, or lacks what is used of it."""
        self.landings = record(model, metas, model_format, is_attention)
        modules = dict(model.named_modules())
        self.layers = [_Layer(name, modules[name], None) for name in self.landings.modules]
        for layer in self.layers:
            if not keeps_layout(layer.name, layer.module, model_config):
                layer.relayout = Relayout(layer.name, layer.module, model_config)
        self.number = {layer.name: i for i, layer in enumerate(self.layers)}
        self.sharing = _sharing(model, modules)


class Landing:
    """A model whose weights are replaced, bucket by bucket."""

    def __init__(self, places: Places, receiver: Receiver, device: torch.device) -> None:
        """Raises RunError if what vLLM takes is not what the plan brings."""
        schedule, number = receiver.schedule, places.number
        needed = {b.name: b.bounds for b in schedule.target.needed(receiver.worker, schedule.tensors.arch)}
        check_against_plan(places.landings, needed)
        self._layers, self._sharing = places.layers, places.sharing
        self._copies = [
            [list(_copies(m.parts, places.landings, number)) for m in bucket] for bucket in receiver.messages
        ]
        counts = Counter(copy.module for bucket in self._copies for message in bucket for copy in message)
        for i, layer in enumerate(self._layers):
            layer.num_copies = counts[i]
        self._paddings = [(number[p.module], p) for p in places.landings.paddings]
        self._scratch = Scratch(device)

    def begin(self) -> None:
        """Before the first bucket of an update."""
        for layer in self._layers:
            layer.left = layer.num_copies

    @torch.no_grad()
    def land(self, bucket: int, arrived: Iterable[torch.Tensor]) -> None:
        """Copies the parts of a bucket's messages into their places."""
        for payload, copies in zip(arrived, self._copies[bucket], strict=True):
            for first, shape, slices, number, key, size, strides, offset in copies:
                layer = self._layers[number]
                if layer.left == layer.num_copies:
                    self._open(number)
                value = payload[first : first + math.prod(shape)].view(shape)
                target = layer.module._parameters[key]
                assert target is not None
                data = target.data
                place = data.as_strided(size, strides, data.storage_offset() + offset)
                place.copy_(value if slices is None else value[slices])
                layer.left -= 1
                if layer.left == 0:
                    self._complete(layer)

    def _open(self, number: int) -> None:
        layer = self._layers[number]
        if layer.relayout is not None:
            layer.relayout.begin(self._scratch)
        for of_layer, padding in self._paddings:
            if of_layer == number:
                data: Any = layer.module._parameters[padding.parameter].data  # type: ignore[union-attr]
                data.as_strided(padding.size, padding.strides, data.storage_offset() + padding.offset).fill_(
                    padding.value
                )

    def _complete(self, layer: _Layer) -> None:
        if layer.relayout is None:
            return
        layer.relayout.finish()
        self._scratch.take_back(layer.module)
        for other in self._sharing.get(layer.name, ()):
            # vLLM packs a tied weight for the embedding only, and the head would go on with the old packed copy.
            other.quant_method.process_weights_after_loading(other)  # type: ignore[union-attr,operator]

    def end(self) -> None:
        """After the last bucket. Raises RunError if a layer lacks weights."""
        lacking = [layer.name for layer in self._layers if layer.left]
        self._scratch.clear()
        if lacking:
            raise RunError(f"{len(lacking)} layers did not get all their weights, first {lacking[0]!r}")

    def put_back(self) -> None:
        """After an error: layers that wait for weights get their former parameters, so that the engine can go on."""
        for layer in self._layers:
            if layer.relayout is not None:
                layer.relayout.put_back()
        self._scratch.clear()


def _copies(parts: Iterable[Part], landings: Landings, number: dict[str, int]) -> Iterable[_Copy]:
    first = 0
    for part in parts:
        for landing in landings.of_tensor[part.name]:
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(part.bounds, landing.bounds, strict=True))
            if all(a < b for a, b in common):
                starts = zip(common, landing.bounds, landing.strides, strict=True)
                offset = landing.offset + sum((a - c) * stride for (a, _), (c, _), stride in starts)
                whole = common == part.bounds
                yield _Copy(
                    first,
                    part.shape,
                    None if whole else tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(common, part.bounds)),  # noqa: B905
                    number[landing.module],
                    landing.parameter,
                    tuple(b - a for a, b in common),
                    landing.strides,
                    offset,
                )
        first += part.numel


def _sharing(model: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> dict[str, list[torch.nn.Module]]:
    """Layer -> other layers that compute with one of its parameters, and make something of it beforehand."""
    found: dict[str, list[torch.nn.Module]] = {}
    for name, others in tied_parameters(model).items():
        sharing = [modules[other.rpartition(".")[0]] for other in others]
        found[name.rpartition(".")[0]] = [m for m in sharing if getattr(m, "quant_method", None) is not None]
    return found


class CorewardEngine(WeightTransferEngine[CorewardInitInfo, CorewardUpdateInfo]):
    """One vLLM worker's end."""

    init_info_cls = CorewardInitInfo
    update_info_cls = CorewardUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.failure: str | None = None  # of the last update
        self._receiver: Receiver | None = None
        self._places: Places | None = None
        self._landing: Landing | None = None

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Abstract in vLLM 0.26. The senders here are the actor's ranks (`weights.senders`)."""
        raise NotImplementedError("weights are sent by the actor's ranks")

    def init_transfer_engine(self, init_info: CorewardInitInfo) -> None:
        """Opens this worker's end; what is wrong with it shows in the next update."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = self._landing = None
        self._init_info = init_info

    def start_weight_update(self) -> None:
        self.failure = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: CorewardUpdateInfo) -> None:
        """Receives all weights. `failure` says what went wrong, if anything did."""
        try:
            self._receive(update_info.version)
        except Exception as error:
            self.failure = f"{error}" if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            if self._receiver is not None:
                self._receiver.abandon(self.failure)
            else:  # nobody else would learn of it before vLLM has the replies of all workers, which wait for this one
                give_up(TransferSpec.from_json(self._init_info.spec), self.failure)
            if self._landing is not None:
                self._landing.put_back()
            self._receiver = None

    def _receive(self, version: int) -> None:
        if self._receiver is None:
            spec = TransferSpec.from_json(self._init_info.spec)
            arch = read_architecture(Path(self.model_config.model))
            worker = self.parallel_config.rank % spec.engines.num_workers
            self._receiver = open_receiver(spec, arch, self._init_info.engine, worker, self.device)
            if self._places is None:
                self._places = Places(self.model, self.model_config, self._receiver.schedule.metas)
            self._landing = Landing(self._places, self._receiver, self.device)
        assert self._landing is not None
        self._landing.begin()
        for bucket, arrived in enumerate(self._receiver.receive(version)):
            self._landing.land(bucket, [payload for _, payload in arrived])
        self._landing.end()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = self._landing = None


def failure_of(worker: Any) -> str | None:
    """What went wrong in the last update of a vLLM worker (`LLM.collective_rpc`); None: nothing."""
    failure: str | None = worker.weight_transfer_engine.failure
    return failure
