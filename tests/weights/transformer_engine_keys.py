"""Prints what Megatron's Transformer Engine layer spec keeps in a distributed checkpoint. A program of its own.

Transformer Engine needs CUDA to be built, so its modules are stood in for by ones that have its parameters (names as in
its documentation) and its extra state, and nothing else. All that makes keys and global shapes out of them is
Megatron's own code: the spec, its Transformer Engine wrappers, the grouped experts, the blocks.

    python tests/weights/transformer_engine_keys.py CONFIG_DIR...
"""

import importlib.abc
import importlib.machinery
import json
import socket
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from packaging.version import Version

from megatron_coreward.actor import cpu_backend


class Module(torch.nn.Module):
    """A module of Transformer Engine, as far as a checkpoint sees it."""

    def __init__(self, **parameters: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in parameters.items():
            param = torch.nn.Parameter(torch.zeros(shape))
            if len(shape) > 1:  # Transformer Engine marks its matrices like this itself
                param.tensor_model_parallel, param.partition_dim, param.partition_stride = True, 0, 1  # type: ignore[attr-defined]
            self.register_parameter(name, param)
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        self.fp8 = self.fp8_calibration = False

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


class Linear(Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
        super().__init__(weight=(out_features, in_features), **({"bias": (out_features,)} if bias else {}))
        self.use_bias = bias


class LayerNormLinear(Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
        biases = {"bias": (out_features,)} if bias else {}
        super().__init__(layer_norm_weight=(in_features,), weight=(out_features, in_features), **biases)
        self.use_bias = bias


class GroupedLinear(Module):
    def __init__(self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
        super().__init__(**{f"weight{i}": (out_features, in_features) for i in range(num_gemms)})
        self.num_gemms, self.use_bias = num_gemms, bias


class RMSNorm(Module):
    def __init__(self, hidden_size: int, **_: Any) -> None:
        super().__init__(weight=(hidden_size,))


class DotProductAttention(Module):
    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class Anything(type):
    """A class whose every attribute is such a class; calling it gives two times nothing (a context and its end)."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return None, None

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stub(types.ModuleType):
    """A module in which everything else that Megatron imports is some class."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "transformer_engine" else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Stub(spec.name)
        if spec.name == "transformer_engine":
            module.__version__ = "2.11.0"  # type: ignore[attr-defined]
        if spec.name == "transformer_engine.pytorch":
            for cls in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
                setattr(module, cls.__name__, cls)
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def install() -> None:
    sys.meta_path.insert(0, Finder())
    for name in ("", ".common", ".common.recipe", ".pytorch", ".pytorch.distributed"):
        importlib.import_module(f"transformer_engine{name}")


def describe(config: Path) -> dict[str, Any]:
    """Global shapes by key, keys of other objects, and parameter names, of the model on one rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from megatron_coreward.actor import model
    from megatron_coreward.config.architecture import read_architecture
    from megatron_coreward.config.schema import ActorSettings

    model.resolve_backend = lambda backend, dtype: "te"
    (chunk,) = model.build_chunks(read_architecture(config), ActorSettings(), torch.float32, 64)
    assert type(chunk.decoder.layers[0].self_attention.linear_qkv).__name__ == "TELayerNormColumnParallelLinear"
    tensors: dict[str, tuple[int, ...]] = {}
    objects = []
    for entry in chunk.sharded_state_dict().values():
        if isinstance(entry, ShardedObject):
            objects.append(entry.unique_key)
            continue
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            tensors[part.key] = part.global_shape
    return {"tensors": tensors, "objects": objects, "parameters": [name for name, _ in chunk.named_parameters()]}


def main(configs: list[Path]) -> None:
    install()
    cpu_backend.install()
    import megatron.core.utils as megatron_utils

    megatron_utils._te_version = Version("2.11.0")
    from megatron_coreward.actor import parallel
    from megatron_coreward.config.schema import ActorSettings

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parallel.initialize(ActorSettings(), 0, "127.0.0.1", port, seed=0)
    json.dump([describe(config) for config in configs], sys.stdout)
    parallel.shutdown()


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
