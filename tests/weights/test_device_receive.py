"""The engines' end of device transports: marks are compared, layers are complete, slots are free again.

The narrow contract below is faked: mapping memory (IPC) and one broadcast (NCCL). vLLM's reloading is real.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_coreward.weights import device
from tests.weights.device_on_ranks import METAS, as_bytes, blocks_of, full

pytest.importorskip("vllm")

BUCKET_BYTES = 128


class Layer(torch.nn.Module):
    """Two parameters of one layer: vLLM's reload waits for both, which come in different buckets."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        for meta in METAS:
            if meta.name in names:
                zeros = torch.zeros(meta.shape, dtype=getattr(torch, meta.dtype))
                self.register_parameter(meta.name, torch.nn.Parameter(zeros, requires_grad=False))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Layer(["by_rows", "whole"])
        self.other = Layer(["by_columns", "of_rank_0"])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        params = {name.rpartition(".")[2]: param for name, param in self.named_parameters()}
        loaded = set()
        for name, tensor in weights:
            loader: Callable[..., Any] = getattr(params[name], "weight_loader", default_weight_loader)
            loader(params[name], tensor)
            loaded.add(name)
        return loaded


@pytest.fixture
def model() -> Model:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = Model()
    record_metadata_for_reloading(model)
    return model


def engine_of(kind: str, model: Model, **parallel: int) -> Any:
    from megatron_coreward.weights.device_receive import IpcEngine, NcclEngine

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**({"rank": 0, "world_size": 1} | parallel)),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    return {"ipc": IpcEngine, "nccl": NcclEngine}[kind](None, config, torch.device("cpu"), model)


def ipc(monkeypatch: pytest.MonkeyPatch, model: Model) -> tuple[device.IpcSender, Any, list[Any]]:
    """A sender and an engine on one GPU, and every mapping of memory that was made."""
    mapped: list[Any] = []
    staging = device.Staging(device.largest_bucket(METAS, BUCKET_BYTES), torch.device("cpu"))
    monkeypatch.setattr(device, "gpu_name", lambda _: "GPU-1")
    monkeypatch.setattr(device, "export_memory", lambda memory: ("GPU-1", ("handle",)))

    def map_it(handle: Any, _: torch.device) -> torch.Tensor:
        mapped.append(handle)
        return staging.memory

    monkeypatch.setattr(device, "import_memory", map_it)
    sender = device.IpcSender(blocks_of(0, 1), METAS, BUCKET_BYTES, 0, 1, staging)
    engine = engine_of("ipc", model)
    engine.init_transfer_engine(engine.parse_init_info(sender.init_info))
    return sender, engine, mapped


def update(sender: device.DeviceSender, engine: Any, version: int, hashes: bool = False) -> None:
    engine.start_weight_update()
    for bucket in range(len(sender.buckets)):
        written = sender.write(bucket, version, hashes)
        plain = [[h.name, h.bounds, h.crc32] for h in written]
        engine.update_weights({"bucket": bucket, "version": version, "hashes": plain})
    engine.finish_weight_update()


def weights_of(model: Model) -> dict[str, bytes]:
    return {name.rpartition(".")[2]: as_bytes(param.detach()) for name, param in model.named_parameters()}


EXPECTED = {meta.name: as_bytes(full(meta.name)) for meta in METAS}


@pytest.mark.parametrize("hashes", [False, True])
def test_ipc_brings_every_bit_and_maps_the_memory_once(
    monkeypatch: pytest.MonkeyPatch, model: Model, hashes: bool
) -> None:
    sender, engine, mapped = ipc(monkeypatch, model)
    for version in (2, 4):
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(9)
        update(sender, engine, version, hashes)
        assert weights_of(model) == EXPECTED
        sender._staging.memory.fill_(1)  # the slots belong to the sender again
        assert weights_of(model) == EXPECTED
        engine.init_transfer_engine(engine.parse_init_info(sender.init_info))
    assert mapped == [("handle",)]


def test_what_waits_for_the_rest_of_its_layer_survives_the_next_bucket(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    """`by_rows` is in bucket 0; `whole`, of the same layer, comes when that slot is overwritten already."""
    sender, engine, _ = ipc(monkeypatch, model)
    engine.start_weight_update()
    sender.write(0, 2)
    engine.update_weights({"bucket": 0, "version": 2})
    sender._staging.memory.fill_(1)
    for bucket in range(1, len(sender.buckets)):
        sender.write(bucket, 2)
        engine.update_weights({"bucket": bucket, "version": 2})
    engine.finish_weight_update()
    assert weights_of(model) == EXPECTED


@pytest.mark.parametrize(("bucket", "version"), [(0, 3), (1, 2)], ids=["another version", "never written"])
def test_a_bucket_that_is_not_the_expected_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: Model, bucket: int, version: int
) -> None:
    sender, engine, _ = ipc(monkeypatch, model)
    engine.start_weight_update()
    sender.write(0, 2)
    if bucket:
        engine.update_weights({"bucket": 0, "version": 2})
    with pytest.raises(RuntimeError, match=f"expected bucket {bucket} of version {version}"):
        engine.update_weights({"bucket": bucket, "version": version})


def test_damage_on_the_way_is_found_with_hashes(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    sender, engine, _ = ipc(monkeypatch, model)
    engine.start_weight_update()
    plain = [[h.name, h.bounds, h.crc32] for h in sender.write(0, 2, hashes=True)]
    sender._staging.memory[5] ^= 1
    with pytest.raises(RuntimeError, match="by_rows.*is not what its sender wrote"):
        engine.update_weights({"bucket": 0, "version": 2, "hashes": plain})


def test_an_engine_on_a_gpu_without_an_actor_rank_is_told(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    sender, engine, _ = ipc(monkeypatch, model)
    monkeypatch.setattr(device, "gpu_name", lambda _: "GPU-7")
    with pytest.raises(RuntimeError, match="no actor rank is on GPU GPU-7.*GPU-1"):
        engine.init_transfer_engine(engine.parse_init_info(sender.init_info))


class Wire:
    """A broadcast between threads: the sender waits until the receiver has taken it."""

    def __init__(self) -> None:
        import queue

        self.sent: Any = queue.Queue()
        self.joined: list[tuple[int, int]] = []

    def join(self, address: str, port: int, rank: int, size: int, _: torch.device) -> int:
        self.joined.append((rank, size))
        return rank

    def broadcast(self, rank: int, memory: torch.Tensor) -> None:
        if rank == 0:
            self.sent.put(memory.clone())
        else:
            memory.copy_(self.sent.get(timeout=20))


def test_nccl_brings_every_bit_over_one_group_for_all_updates(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    wire = Wire()
    monkeypatch.setattr(device, "join_nccl", wire.join)
    monkeypatch.setattr(device, "broadcast", wire.broadcast)
    staging = device.Staging(device.largest_bucket(METAS, BUCKET_BYTES), torch.device("cpu"))
    sender = device.NcclSender(blocks_of(0, 1), METAS, BUCKET_BYTES, 0, 1, staging, address="host", num_workers=4)
    engine = engine_of("nccl", model, rank=1, world_size=2)
    engine.init_transfer_engine(engine.parse_init_info(sender.init_info | {"engine": 1}))
    for version in (2, 4):
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(9)
        update(sender, engine, version)
        assert weights_of(model) == EXPECTED
    assert sorted(wire.joined) == [(0, 5), (4, 5)]
    engine.shutdown()


def test_after_an_update_that_failed_over_nccl_the_engine_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    wire = Wire()
    monkeypatch.setattr(device, "join_nccl", wire.join)
    monkeypatch.setattr(device, "broadcast", wire.broadcast)
    staging = device.Staging(device.largest_bucket(METAS, BUCKET_BYTES), torch.device("cpu"))
    sender = device.NcclSender(blocks_of(0, 1), METAS, BUCKET_BYTES, 0, 1, staging, address="host", num_workers=1)
    engine = engine_of("nccl", model)
    engine.init_transfer_engine(engine.parse_init_info(sender.init_info))
    engine.start_weight_update()
    sender.write(0, 2)
    with pytest.raises(RuntimeError, match="expected bucket 0 of version 3"):
        engine.update_weights({"bucket": 0, "version": 3})
    with pytest.raises(RuntimeError, match="failed before"):
        engine.start_weight_update()
    engine.shutdown()


def test_vllm_finds_the_engines_by_their_names() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_coreward.weights.device_receive import IpcEngine, NcclEngine
    from megatron_coreward.weights.receive import register
    from megatron_coreward.weights.route import ENGINE_BACKENDS

    register()
    found = {name: WeightTransferEngineFactory._registry[name]() for name in ENGINE_BACKENDS.values()}
    assert found[ENGINE_BACKENDS["ipc"]] is IpcEngine
    assert found[ENGINE_BACKENDS["nccl"]] is NcclEngine
