"""Every rank has the full tensors of a bucket, bit by bit, and holds two buckets at most. On CPU tensors and gloo."""

from typing import Any

import pytest
import torch

from megatron_coreward.errors import InputError
from megatron_coreward.weights import device
from megatron_coreward.weights.buckets import plan_buckets
from megatron_coreward.weights.route import choose_transport
from megatron_coreward.weights.send import LocalBlock
from tests.actor.ranks import free_port, run_ranks
from tests.weights.device_on_ranks import ALL, METAS, as_bytes, blocks_of, full, send, sender_of

BUCKET_BYTES = 128


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_all_ranks_hold_the_bits_that_the_blocks_make(num_ranks: int) -> None:
    results = run_ranks(num_ranks, send, num_ranks, free_port(), BUCKET_BYTES)
    buckets = plan_buckets(METAS, BUCKET_BYTES)
    assert len(buckets) == 3
    for of_rank in results:
        marks = [found["mark"] for found in of_rank]
        assert marks == [(version, number) for version in (6, 7) for number in range(len(buckets))]
        for found, bucket in zip(of_rank, (*buckets, *buckets), strict=True):
            assert found["bytes"] == {e.meta.name: as_bytes(full(e.meta.name)) for e in bucket.entries}
    hashed = [name for of_rank in results for found in of_rank for name, _, _ in found["hashes"]]
    assert sorted(set(hashed)) == sorted(meta.name for meta in METAS)


def test_memory_is_two_of_the_largest_buckets_for_any_number_of_senders() -> None:
    staging = device.Staging(device.largest_bucket(METAS, BUCKET_BYTES), torch.device("cpu"))
    senders = [device.DeviceSender(blocks_of(0, 1), METAS, BUCKET_BYTES, 0, 1, staging) for _ in range(2)]
    largest = max(bucket.nbytes for bucket in plan_buckets(METAS, BUCKET_BYTES))
    assert staging.memory.nbytes == 2 * (largest + device.MARK_BYTES)
    places = {sender.fill(number, 1).data_ptr() for sender in senders for number in range(len(sender.buckets))}
    assert places == {staging.slot(0).data_ptr(), staging.slot(1).data_ptr()}


def test_a_block_of_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="'stranger'"):
        device.DeviceSender(
            [LocalBlock("stranger", (ALL,), lambda: torch.zeros(1))], METAS, 64, 0, 1, device.Staging(64, _cpu())
        )


@pytest.mark.parametrize("value", [torch.zeros(6), torch.zeros(7, dtype=torch.int32)], ids=["shape", "dtype"])
def test_a_block_that_reads_something_else_is_refused(value: torch.Tensor) -> None:
    blocks = [LocalBlock("whole", (ALL,), lambda: value)]
    sender = device.DeviceSender(blocks, METAS, 1024, 0, 1, device.Staging(1024, _cpu()))
    with pytest.raises(ValueError, match="'whole'"):
        sender.fill(0, 1)


def test_ipc_tells_where_the_memory_of_each_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "export_memory", lambda memory: ("GPU-1", (memory.data_ptr(),)))
    staging = device.Staging(1024, _cpu())
    sender = device.IpcSender(blocks_of(0, 1), METAS, 1024, 0, 1, staging)
    assert sender.init_info["handles"] == {"GPU-1": (staging.memory.data_ptr(),)}
    assert sender.init_info["slot_bytes"] == staging.slot_bytes


def test_nccl_broadcasts_each_bucket_from_rank_0_over_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[tuple[Any, ...]] = []
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(device, "join_nccl", lambda *where: joined.append(where) or "group")  # type: ignore[func-returns-value]

    def record(group: str, memory: torch.Tensor) -> None:
        assert group == "group"
        sent.append(device.read_mark(memory, len(memory) - device.MARK_BYTES))

    monkeypatch.setattr(device, "broadcast", record)
    staging = device.Staging(1024, _cpu())
    sender = device.NcclSender(blocks_of(0, 1), METAS, 128, 0, 1, staging, address="host", num_workers=4)
    for number in range(3):
        sender.write(number, 8)
    assert sent == [(8, 0), (8, 1), (8, 2)]
    assert [(address, rank, size) for address, _, rank, size, _ in joined] == [("host", 0, 5)]
    assert sender.init_info["size"] == 5


def test_vllms_own_trainer_side_can_be_fed() -> None:
    """`metadata` agrees with the iteration element for element, as the interface asks, and with the tensors."""
    pytest.importorskip("vllm")
    from megatron_coreward.weights.device_source import BucketSource

    source = BucketSource(sender_of(0, 1, BUCKET_BYTES))
    for _ in range(2):  # every round anew
        pairs = list(source)
        declared = [(m.name, m.dtype, m.shape) for m in source.metadata()]
        assert declared == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]
        assert [as_bytes(tensor) for _, tensor in pairs] == [as_bytes(full(meta.name)) for meta in METAS]


@pytest.mark.parametrize(
    ("wanted", "where", "transport"),
    [
        ("auto", {"gpus": True, "colocated": True, "num_hosts": 1}, "ipc"),
        ("auto", {"gpus": True, "colocated": True, "num_hosts": 4}, "ipc"),
        ("auto", {"gpus": True, "colocated": False, "num_hosts": 1}, "nccl"),
        ("auto", {"gpus": False, "colocated": True, "num_hosts": 1}, "shared_memory"),
        ("auto", {"gpus": False, "colocated": False, "num_hosts": 2}, "gloo"),
        ("gloo", {"gpus": True, "colocated": False, "num_hosts": 1}, "gloo"),
        ("shared_memory", {"gpus": True, "colocated": False, "num_hosts": 1}, "shared_memory"),
    ],
)
def test_the_transport_follows_from_placement_gpus_and_hosts(
    wanted: str, where: dict[str, Any], transport: str
) -> None:
    assert choose_transport(wanted, **where) == transport


@pytest.mark.parametrize(
    ("wanted", "where", "words"),
    [
        ("ipc", {"gpus": False, "colocated": True, "num_hosts": 1}, "ipc needs GPUs"),
        ("nccl", {"gpus": False, "colocated": False, "num_hosts": 1}, "nccl needs GPUs"),
        ("shared_memory", {"gpus": True, "colocated": False, "num_hosts": 2}, "reaches one host, the cluster has 2"),
    ],
)
def test_a_transport_that_cannot_reach_the_engines_is_refused(wanted: str, where: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        choose_transport(wanted, **where)


def _cpu() -> torch.device:
    return torch.device("cpu")
