"""Where slices land is what loaders do with them, whatever they do; and nothing is copied while they are watched."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import TensorMeta
from megatron_coreward.weights.receivers.landing import Landings, check_against_plan, record

Loader = Callable[..., None]

METAS = [
    TensorMeta("q", (4, 6), "float32"),
    TensorMeta("k", (2, 6), "float32"),
    TensorMeta("down", (6, 8), "float32"),
    TensorMeta("expert.0", (3, 6), "float32"),
    TensorMeta("expert.1", (3, 6), "float32"),
    TensorMeta("vocabulary", (5, 6), "float32"),
    TensorMeta("norm", (6,), "float32"),
]


class Layer(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full(shape, 7.0), requires_grad=False)


class Model(torch.nn.Module):
    """Fuses, cuts by columns, stacks, transposes and pads, as vLLM's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.down, self.experts = Layer((6, 6)), Layer((6, 4)), Layer((2, 6, 3))
        self.vocabulary, self.norm = Layer((8, 6)), Layer((6,))
        self.extra: dict[str, Loader] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name in self.extra:
                self.extra[name](self, tensor)
            elif name == "q":
                self.qkv.weight.data.narrow(0, 0, 4).copy_(tensor)
            elif name == "k":
                self.qkv.weight.data[4:].copy_(tensor)
            elif name == "down":
                self.down.weight.data.copy_(tensor.narrow(1, 4, 4))
            elif name.startswith("expert"):
                self.experts.weight.data[int(name[-1])].t().copy_(tensor)
            elif name == "vocabulary":
                self.vocabulary.weight.data[:5].copy_(tensor)
                self.vocabulary.weight.data[5:].fill_(0)
            elif name == "norm":
                self.norm.weight.data.copy_(tensor)
            else:
                raise ValueError(f"no module or parameter named {name!r}")


def to_meta(module: torch.nn.Module) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def recorded(model: torch.nn.Module, metas: list[TensorMeta] = METAS) -> Landings:
    return record(model, metas, to_meta, lambda module: False)


def land(model: torch.nn.Module, landings: Landings, tensors: dict[str, torch.Tensor]) -> None:
    modules = dict(model.named_modules())
    for padding in landings.paddings:
        data: Any = modules[padding.module].weight.data
        data.as_strided(padding.size, padding.strides, padding.offset).fill_(padding.value)
    for name, of_one in landings.of_tensor.items():
        for landing in of_one:
            block = tensors[name][tuple(slice(*cut) for cut in landing.bounds)]
            data = getattr(modules[landing.module], landing.parameter).data
            data.as_strided(block.shape, landing.strides, landing.offset).copy_(block)


def test_copying_to_the_recorded_places_does_what_the_loaders_do() -> None:
    tensors = {meta.name: torch.randn(meta.shape) for meta in METAS}
    loaded, copied = Model(), Model()
    loaded.load_weights(tensors.items())
    land(copied, recorded(copied), tensors)
    for (name, expected), (_, found) in zip(loaded.named_parameters(), copied.named_parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_nothing_changes_while_the_loaders_are_watched() -> None:
    model = Model()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    landings = recorded(model)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert all((p == 7).all() for p in model.parameters())
    assert landings.modules == ["qkv", "down", "experts", "vocabulary", "norm"]
    assert landings.of_tensor["down"][0].bounds == ((0, 6), (4, 8))


def scale(model: Any, tensor: torch.Tensor) -> None:
    model.norm.weight.data.copy_(tensor * 2)


def add(model: Any, tensor: torch.Tensor) -> None:
    model.norm.weight.data.add_(tensor)


def fold(model: Any, tensor: torch.Tensor) -> None:
    model.qkv.weight.data[:4].copy_(tensor.reshape(6, 4).t())


def look(model: Any, tensor: torch.Tensor) -> None:
    model.norm.weight.data.fill_(tensor.sum().item())


@pytest.mark.parametrize(
    ("name", "loader", "complaint"),
    [
        ("norm", scale, "loader of 'norm.weight' does more than copy blocks"),
        ("norm", add, "loader of 'norm.weight' does more than copy blocks"),
        ("q", fold, "loader of 'qkv.weight' does more than copy blocks"),
        ("norm", look, "needs values of weights"),
        ("norm", lambda model, tensor: None, "no parameter for 'norm'"),
        (
            "down",
            lambda model, tensor: model.down.weight.data[:5].copy_(tensor[:5, :4]),
            "'down.weight' would get 20 of its 24 elements",
        ),
    ],
)
def test_a_loader_that_does_more_or_less_than_copy_blocks_is_refused(name: str, loader: Loader, complaint: str) -> None:
    model = Model()
    model.extra[name] = loader
    with pytest.raises(RunError, match=complaint):
        recorded(model)
    assert all((p == 7).all() for p in model.parameters())  # and not on the meta device


def test_a_tensor_that_the_model_does_not_have_is_named() -> None:
    with pytest.raises(RunError, match="no place for a tensor.*'gate'"):
        recorded(Model(), [*METAS, TensorMeta("gate", (2,), "float32")])


def test_a_parameter_that_would_stay_as_it_was_is_named() -> None:
    with pytest.raises(RunError, match=r"'norm.weight' would get 0 of its 6 elements"):
        recorded(Model(), METAS[:-1])


def test_a_tied_layer_is_filled_under_its_first_name_only() -> None:
    model = Model()
    model.head = Layer((8, 6))
    model.head.weight = model.vocabulary.weight
    metas = [TensorMeta("vocabulary.weight", (5, 6), "float32"), *METAS[:5], METAS[6]]
    model.extra["vocabulary.weight"] = lambda model, tensor: Model.load_weights(model, [("vocabulary", tensor)])
    assert {landing.module for landing in recorded(model, metas).of_tensor["vocabulary.weight"]} == {"vocabulary"}
    with pytest.raises(RunError, match="'head.weight' is tied to 'vocabulary.weight' in this engine: only"):
        recorded(model, [*metas, TensorMeta("head.weight", (5, 6), "float32")])
    with pytest.raises(RunError, match="'vocabulary.weight', to which 'head.weight' is tied, is not among"):
        recorded(model, metas[1:])


def test_what_the_loaders_take_must_be_what_the_plan_brings() -> None:
    landings = recorded(Model())
    plan: dict[str, Any] = {meta.name: tuple((0, size) for size in meta.shape) for meta in METAS}
    plan["down"] = ((0, 6), (4, 8))
    check_against_plan(landings, plan)
    for name, bounds in (("down", ((0, 6), (0, 4))), ("down", ((0, 6), (4, 7))), ("q", None)):
        wrong = plan | {name: bounds} if bounds else {key: value for key, value in plan.items() if key != name}
        with pytest.raises(RunError, match=f"of '{name}', the plan brings"):
            check_against_plan(landings, wrong)
