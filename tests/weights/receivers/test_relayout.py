"""Layers that compute with something else than their loaded weights: found out, laid out in time, never half done."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from megatron_coreward.weights.receivers.relayout import Relayout, Scratch, keeps_layout

CONFIG = SimpleNamespace(dtype=torch.float32)


class Method(QuantizeMethodBase):
    """What a layer does with its weights: `process`."""

    def __init__(self, process: Any = lambda layer: None) -> None:
        self.process = process

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None: ...

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.process(layer)


class Layer(torch.nn.Module):
    def __init__(self, method: Method | None, rows: int = 4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((rows, 3), 7.0), requires_grad=False)
        self.quant_method = method
        record_metadata_for_reloading(self)
        if method is not None:
            method.process_weights_after_loading(self)


def pack(layer: Any) -> None:
    """As CPU kernels: a copy elsewhere, and no parameter that is worth its memory."""
    layer.packed = layer.weight.detach().clone() + 100
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def swap(layer: Any) -> None:
    """As kernels that want the halves of a fused weight the other way round: the same shape."""
    layer.weight.data.copy_(layer.weight.data.roll(2, 0))


def land(layer: Any, relayout: Relayout, scratch: Scratch, value: float) -> None:
    relayout.begin(scratch)
    layer.weight.data.fill_(value)
    relayout.finish()
    scratch.take_back(layer)


def test_a_packed_layer_gets_new_weights_and_its_own_parameters_back() -> None:
    layer = Layer(Method(pack))
    scratch, relayout = Scratch(torch.device("cpu")), Relayout("layer", layer, CONFIG)
    own = layer.weight
    for value in (1.0, 2.0):
        land(layer, relayout, scratch, value)
        assert (layer.packed == 100 + value).all()
        assert layer.packed.shape == (4, 3)
        assert layer.weight is own


def test_layers_of_one_shape_use_the_same_memory_unless_one_of_them_still_refers_to_it() -> None:
    layers: list[Any] = [Layer(Method(pack)) for _ in range(3)]
    scratch, pointers = Scratch(torch.device("cpu")), []
    for layer in layers:
        relayout = Relayout("layer", layer, CONFIG)
        relayout.begin(scratch)
        pointers.append(layer.weight.data_ptr())
        relayout.finish()
        scratch.take_back(layer)
    assert len(set(pointers)) == 1

    def keep(layer: Any) -> None:
        layer.kept = layer.weight.detach()
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    keeping: list[Any] = [Layer(Method(keep)) for _ in range(2)]
    for number, layer in enumerate(keeping):
        land(layer, Relayout("layer", layer, CONFIG), scratch, float(number))
    assert [float(layer.kept[0, 0]) for layer in keeping] == [0.0, 1.0]


def test_an_update_that_is_given_up_leaves_the_layer_as_it_was() -> None:
    layer: Any = Layer(Method(pack))
    scratch, relayout = Scratch(torch.device("cpu")), Relayout("layer", layer, CONFIG)
    own = layer.weight
    relayout.begin(scratch)
    layer.weight.data[0] = 1.0
    relayout.put_back()
    relayout.put_back()
    assert layer.weight is own
    assert (layer.packed == 107).all()
    land(layer, relayout, scratch, 3.0)
    assert (layer.packed == 103).all()


@pytest.mark.parametrize(
    ("method", "keeps"),
    [(None, True), (Method(), True), (Method(swap), False), (Method(pack), False)],
    ids=["no method", "as loaded", "swapped", "packed"],
)
def test_whether_a_layer_computes_with_its_weights_as_they_were_loaded_is_found_out(
    method: Method | None, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_coreward.weights.receivers import relayout

    monkeypatch.setattr(relayout, "packs_copies", lambda module: False)  # as on a GPU
    layer = Layer(method)
    assert keeps_layout("layer", layer, CONFIG) is keeps


@pytest.mark.parametrize("row", [0, 200, 399])
def test_layers_are_compared_a_few_rows_at_a_time(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a model may leave a GPU no room for another copy of a layer in 64-bit numbers."""
    from megatron_coreward.weights.receivers import relayout

    monkeypatch.setattr(relayout, "packs_copies", lambda module: False)
    monkeypatch.setattr(relayout, "_COMPARED_AT_A_TIME", 30)
    sizes: list[int] = []
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *bounds, **more: sizes.append(bounds[1] - bounds[0]) or arange(*bounds))

    def change(layer: Any) -> None:
        layer.weight.data[row, 1] += 1

    assert keeps_layout("layer", Layer(Method(), rows=400), CONFIG)
    assert not keeps_layout("layer", Layer(Method(change), rows=400), CONFIG)
    assert max(sizes) <= 30
    assert sum(sizes) > 3 * 400 * 3


def test_on_cpu_a_layer_may_compute_with_a_packed_copy_beside_weights_that_look_as_loaded() -> None:
    assert not keeps_layout("layer", Layer(Method()), CONFIG)
    assert keeps_layout("norm", Layer(None), CONFIG)
