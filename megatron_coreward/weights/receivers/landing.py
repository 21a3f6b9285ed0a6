"""Where each block of each HF tensor lands in the parameters of a vLLM model, as vLLM's own loaders have it.

The loaders are run once, on tensors without memory (meta tensors): every view that they take keeps its place, and what
they would copy, from where to where, is written down instead of copied. So fused, cut, stacked and renamed weights need
no table of ours, and later weight syncs copy each slice into its place without asking anybody.

Invariants (tests/weights/receivers/test_landing.py):
  1. Nothing is copied while the loaders are watched, and the model is afterwards what it was before.
  2. A model is refused if a loader does more than copy blocks, or if a parameter would stay as it was.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_coreward.errors import RunError
from megatron_coreward.weights.buckets import TensorMeta
from megatron_coreward.weights.layouts import Bounds


class Landing(NamedTuple):
    """`hf_tensor[bounds]` lands in `parameter.as_strided(size of the bounds, strides, offset)`."""

    module: str
    parameter: str
    bounds: Bounds
    strides: tuple[int, ...]
    offset: int  # elements from the parameter's first


class Padding(NamedTuple):
    """Elements that a loader fills with one value, such as vocabulary rows that no checkpoint has."""

    module: str
    parameter: str
    size: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    value: float


@dataclass(frozen=True)
class Landings:
    """Of all tensors of a model."""

    of_tensor: dict[str, list[Landing]]
    paddings: list[Padding]

    @property
    def modules(self) -> list[str]:
        """Modules that get something, in the order of the tensors."""
        return list(dict.fromkeys(landing.module for of_one in self.of_tensor.values() for landing in of_one))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what is copied into parameters, and copies nothing."""

    def __init__(self, sources: dict[int, TensorMeta], targets: dict[int, tuple[str, str, int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources, self._targets = sources, targets
        self.of_tensor: dict[str, list[Landing]] = defaultdict(list)
        self.paddings: list[Padding] = []
        self.changed: set[tuple[str, str]] = set()  # parameters that are written in a way that is not understood

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func in (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default):
            target = args[0]
            place = self._targets.get(_storage(target))
            if place is not None:
                module, parameter, first = place
                offset = target.storage_offset() - first
                if func is aten.copy_.default:
                    self._copied(args[1], target, module, parameter, offset)
                else:
                    value = 0.0 if func is aten.zero_.default else float(args[1])
                    size, strides = tuple(target.shape), tuple(target.stride())
                    self.paddings.append(Padding(module, parameter, size, strides, offset, value))
                return target
        elif func._schema.is_mutable and isinstance(args[0], torch.Tensor):
            place = self._targets.get(_storage(args[0]))
            if place is not None:
                self.changed.add(place[:2])
        return func(*args, **(kwargs or {}))

    def _copied(self, source: torch.Tensor, target: torch.Tensor, module: str, parameter: str, offset: int) -> None:
        meta = self._sources.get(_storage(source))
        bounds = None if meta is None or source.shape != target.shape else _bounds(source, meta.shape)
        if meta is None or bounds is None:
            self.changed.add((module, parameter))
            return
        self.of_tensor[meta.name].append(Landing(module, parameter, bounds, tuple(target.stride()), offset))


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bounds(block: torch.Tensor, shape: tuple[int, ...]) -> Bounds | None:
    """Which block of a contiguous tensor of that shape a view of it is; None: it is no such block."""
    if block.dim() != len(shape):
        return None
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    left, bounds = int(block.storage_offset()), []
    for size, stride, found, whole in zip(block.shape, strides, block.stride(), shape, strict=True):
        if size > 1 and found != stride:
            return None
        start, left = divmod(left, stride)
        if start + size > whole:
            return None
        bounds.append((start, start + size))
    return tuple(bounds) if left == 0 else None


def record(
    model: torch.nn.Module,
    metas: Sequence[TensorMeta],
    model_format: Callable[[torch.nn.Module], None],
    ignored: Callable[[torch.nn.Module], bool],
) -> Landings:
    """Watches the loaders of a vLLM model.

    Args:
        metas: the tensors that will be sent.
        model_format: gives a module's parameters the form that loaders expect, without memory (`relayout`).
        ignored: modules whose parameters are not of the checkpoint.

    Raises:
        RunError: see the top of the file.
    """
    tied = tied_parameters(model)
    _check_tied(tied, metas)
    tensors = {m.name: torch.empty(m.shape, dtype=getattr(torch, m.dtype), device="meta") for m in metas}
    sources = {_storage(tensors[meta.name]): meta for meta in metas}
    with _in_model_format(model, model_format):
        parameters = {
            (name, key): parameter
            for name, module in model.named_modules()
            if not ignored(module)
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.numel() > 0
        }
        targets = {_storage(p): (*place, int(p.storage_offset())) for place, p in parameters.items()}
        with _Watch(sources, targets) as watch:
            _load(model, tensors)
        # The first of several layers that share a parameter gets it; the others share its memory.
        shared = {(module, key) for others in tied.values() for module, _, key in (o.rpartition(".") for o in others)}
        wanted = {place: p for place, p in parameters.items() if place not in shared}
        _check(watch, wanted, metas)
    return Landings(dict(watch.of_tensor), watch.paddings)


def _load(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """vLLM's loaders raise for names that the model does not have, except that they skip biases (some quantised
    checkpoints have superfluous ones)."""
    try:
        model.load_weights(iter(tensors.items()))
    except (ValueError, KeyError) as error:
        raise RunError(f"vLLM's model has no place for a tensor that is to be sent: {error}") from error
    except (NotImplementedError, RuntimeError) as error:  # meta tensors have no values
        if "meta" not in str(error):
            raise
        raise RunError(f"a loader of vLLM's model needs values of weights, not only their places: {error}") from error


def _check(watch: _Watch, parameters: dict[tuple[str, str], torch.nn.Parameter], metas: Sequence[TensorMeta]) -> None:
    for module, key in sorted(watch.changed):
        raise RunError(f"vLLM's loader of '{module}.{key}' does more than copy blocks of the checkpoint's tensors")
    for meta in metas:
        if meta.name not in watch.of_tensor:
            raise RunError(f"vLLM's model has no parameter for {meta.name!r}")
    covered: dict[tuple[str, str], int] = defaultdict(int)
    for landing in (landing for of_one in watch.of_tensor.values() for landing in of_one):
        covered[landing.module, landing.parameter] += math.prod(b - a for a, b in landing.bounds)
    for padding in watch.paddings:
        covered[padding.module, padding.parameter] += math.prod(padding.size)
    for (module, key), parameter in parameters.items():
        expected = getattr(parameter, "weight_loader_numel", parameter.numel())
        if covered[module, key] < expected:
            found = covered[module, key]
            raise RunError(
                f"'{module}.{key}' would get {found} of its {expected} elements from the tensors that are sent"
            )


@contextmanager
def _in_model_format(model: torch.nn.Module, model_format: Callable[[torch.nn.Module], None]) -> Iterator[None]:
    """All modules as loaders expect them; afterwards as they were, with the same parameters."""
    kept = [(m, dict(m._parameters), dict(m._buffers), set(m._non_persistent_buffers_set)) for m in model.modules()]
    try:
        for module, *_ in kept:
            model_format(module)
            for parameter in module._parameters.values():
                loader = getattr(parameter, "weight_loader", None)
                while getattr(loader, "__name__", "") == "online_process_loader":  # of a quantisation while loading
                    loader = loader.__wrapped__  # type: ignore[union-attr]
                    parameter.weight_loader = loader  # type: ignore[union-attr]
        yield
    finally:
        for module, parameters, buffers, non_persistent in kept:
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = non_persistent


def tied_parameters(model: torch.nn.Module) -> dict[str, list[str]]:
    """Parameters that several layers share: the first name -> the other names."""
    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            known = first.setdefault(id(parameter), name)
            if known != name:
                tied.setdefault(known, []).append(name)
    return tied


def _check_tied(tied: dict[str, list[str]], metas: Iterable[TensorMeta]) -> None:
    sent = {meta.name for meta in metas}
    for name, others in tied.items():
        if name not in sent:
            raise RunError(f"{name!r}, to which {others[0]!r} is tied, is not among the tensors that are sent")
        twice = sent.intersection(others)
        if twice:
            raise RunError(f"{min(twice)!r} is tied to {name!r} in this engine: only {name!r} may be sent")


def check_against_plan(landings: Landings, needed: dict[str, Bounds]) -> None:
    """What vLLM's loaders take must be what the plan brings, tensor by tensor.

    Args:
        needed: the block that the plan brings of each tensor.

    Raises:
        RunError: naming the first tensor about which they disagree.
    """
    for name in dict.fromkeys([*needed, *landings.of_tensor]):
        taken = {landing.bounds for landing in landings.of_tensor.get(name, ())}
        brought = needed.get(name)
        volume = functools.partial(math.prod)
        fits = brought is not None and taken == {brought}
        if not fits and brought is not None and taken:  # several blocks that make up what is brought
            inside = all(a <= c and d <= b for block in taken for (a, b), (c, d) in zip(brought, block, strict=True))
            sizes = sum(volume(d - c for c, d in block) for block in taken)
            fits = inside and sizes == volume(b - a for a, b in brought)
        if not fits:
            raise RunError(
                f"weight sync: this vLLM takes {sorted(taken) or 'nothing'} of {name!r}, the plan brings {brought}: "
                "its way to cut the model is not the one that weights.layouts.EngineLayout knows"
            )
