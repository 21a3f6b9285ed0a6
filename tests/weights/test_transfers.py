"""Weights from all ranks to all workers over every transport: each worker gets exactly its own blocks, and of whatever
goes wrong on the way all hear.

CUDA IPC itself is faked: mapping memory of another process. Who packs, sends, collects and waits for what is real.
"""

import functools
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch

from megatron_coreward.config.architecture import Architecture, Experts
from megatron_coreward.errors import RunError
from megatron_coreward.weights import cuda_ipc, groups
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.mailbox import SHARED_MEMORY
from megatron_coreward.weights.mapping import hf_tensors
from megatron_coreward.weights.meeting import Meeting, give_up
from megatron_coreward.weights.ports import free_port
from megatron_coreward.weights.receivers import Receiver, open_receiver
from megatron_coreward.weights.senders import open_sender
from megatron_coreward.weights.spec import Transport
from tests.weights.ranks import Ranks, spec_of

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

DENSE = Architecture(
    family="qwen2",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=12,
    vocab_size=131,
    max_position=64,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-6,
    experts=None,
)
MOE = Architecture(**{**{f: getattr(DENSE, f) for f in DENSE.__slots__}, "experts": Experts(4, 2, 8, True)})
CASES = {
    "TP 2 to TP 1": (DENSE, ActorLayout(tensor_parallel=2), EngineLayout(1, 1)),
    "TP 1 to TP 2": (DENSE, ActorLayout(), EngineLayout(1, 2)),
    "PP 2 to two engines": (DENSE, ActorLayout(pipeline_parallel=2), EngineLayout(2, 1)),
    "DP 2 to TP 4, more workers than key heads": (DENSE, ActorLayout(data_parallel=2), EngineLayout(1, 4)),
    "experts, EP 2": (MOE, ActorLayout(data_parallel=2, expert_parallel=2), EngineLayout(1, 2)),
    "one rank to three engines": (DENSE, ActorLayout(), EngineLayout(3, 1)),
}
COLOCATED = {  # a rank beside every worker
    "TP 2 to TP 2": (DENSE, ActorLayout(tensor_parallel=2), EngineLayout(1, 2)),
    "TP 4 to two engines of TP 2": (DENSE, ActorLayout(tensor_parallel=2, data_parallel=2), EngineLayout(2, 2)),
    "PP 4 to one engine": (DENSE, ActorLayout(pipeline_parallel=2, tensor_parallel=2), EngineLayout(1)),
    "TP 2 x DP 2 to four engines": (MOE, ActorLayout(tensor_parallel=2, data_parallel=2), EngineLayout(4)),
    "one rank, one worker": (DENSE, ActorLayout(), EngineLayout()),
}


def values(arch: Architecture, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_tensors(arch).items()}


class World:
    """All ranks and workers of a transfer, in threads of this process."""

    def __init__(
        self, transport: Transport, case: tuple[Architecture, ActorLayout, EngineLayout], **options: Any
    ) -> None:
        self.arch, actor, self.engines = case
        self.ranks = Ranks(self.arch, values(self.arch, 0), transport, actor, self.engines, bucket_bytes=600, **options)
        self.workers = list(product(range(self.engines.num_engines), range(self.engines.num_workers)))
        self.receivers = [
            open_receiver(self.ranks.spec, self.arch, engine, worker, torch.device("cpu"))
            for engine, worker in self.workers
        ]
        self.pool = ThreadPoolExecutor(len(self.receivers))

    def receive(self, receiver: Receiver, version: int) -> dict[str, torch.Tensor]:
        """What a worker gets, in tensors of NaN."""
        own = {name: torch.full(shape, torch.nan) for name, shape in hf_tensors(self.arch).items()}
        try:
            for arrived in receiver.receive(version):
                for message, payload in arrived:
                    first = 0
                    for part in message.parts:
                        assert own[part.name][part.slices].isnan().all()  # nothing comes twice
                        own[part.name][part.slices] = payload[first : first + part.numel].view(part.shape)
                        first += part.numel
                    assert first == payload.numel()
        except BaseException as error:
            receiver.abandon(str(error))
            raise
        return own

    def update(self, version: int, expected: int | None = None) -> list["Future[dict[str, torch.Tensor]]"]:
        self.sending = self.ranks.start(version)
        number = version if expected is None else expected
        return [self.pool.submit(self.receive, receiver, number) for receiver in self.receivers]

    def check(self, received: list["Future[dict[str, torch.Tensor]]"]) -> None:
        for future in self.sending:
            future.result(timeout=60)
        for (_, worker), future in zip(self.workers, received, strict=True):
            own = future.result(timeout=60)
            needed = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in hf_tensors(self.arch).items()}
            for name, bounds in self.engines.needed(worker, self.arch):
                needed[name][tuple(slice(*cut) for cut in bounds)] = True
            for name, wanted in needed.items():
                assert torch.equal(own[name][wanted], self.ranks.tensors[name][wanted])
                assert own[name][~wanted].isnan().all()

    def close(self) -> None:
        for receiver in self.receivers:
            receiver.close()
        self.ranks.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


Start = Callable[..., World]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[World] = []

    def make(*arguments: Any, **options: Any) -> World:
        started.append(World(*arguments, **options))
        return started[-1]

    yield make
    for world in started:
        world.close()
    assert list(SHARED_MEMORY.glob(f"megatron_coreward.test-{os.getpid()}-*")) == []


def run_updates(world: World) -> None:
    assert len(world.ranks.senders[0].messages) > 5
    for version in (4, 6, 7):
        world.ranks.tensors.update(values(world.arch, version))
        world.check(world.update(version))


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("case", CASES)
def test_a_worker_gets_its_own_blocks_and_nothing_else(case: str, transport: Transport, start: Start) -> None:
    run_updates(start(transport, CASES[case]))


@pytest.fixture
def one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Memory that is exported is found again by its name; returns what was mapped."""
    memories: dict[str, torch.Tensor] = {}
    mapped: list[str] = []

    def export(memory: torch.Tensor) -> str:
        memories[f"memory {len(memories)}"] = memory
        return f"memory {len(memories) - 1}"

    def map_it(exported: str, device: torch.device) -> torch.Tensor:
        mapped.append(exported)
        return memories[exported]

    monkeypatch.setattr(cuda_ipc, "export_memory", export)
    monkeypatch.setattr(cuda_ipc, "import_memory", map_it)
    return mapped


@pytest.mark.parametrize("case", COLOCATED)
def test_a_worker_reads_from_the_rank_on_its_own_gpu(case: str, start: Start, one_gpu_each: list[str]) -> None:
    world = start("ipc", COLOCATED[case])
    run_updates(world)
    assert len(one_gpu_each) == len(set(one_gpu_each)) == len(world.workers)  # each memory is mapped once


def test_a_worker_on_another_gpu_than_its_rank_is_refused(
    start: Start, one_gpu_each: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = start("ipc", COLOCATED["one rank, one worker"])

    def elsewhere(exported: str, device: torch.device) -> torch.Tensor:
        raise ValueError("the memory is on GPU 1, this process on GPU 7")

    monkeypatch.setattr(cuda_ipc, "import_memory", elsewhere)
    with pytest.raises(RunError, match="actor rank 0, and the memory is on GPU 1, this process on GPU 7.*use auto"):
        world.update(4)[0].result(timeout=20)
    with pytest.raises(RunError, match="given up.*GPU 7"):  # the rank does not wait for it
        world.sending[0].result(timeout=20)


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_weights_of_another_version_are_refused_by_all(transport: Transport, start: Start) -> None:
    world = start(transport, CASES["TP 2 to TP 1"])
    with pytest.raises(RunError, match="bucket 0 of version 4 .* expected bucket 0 of version 6"):
        world.update(4, expected=6)[0].result(timeout=20)
    for future in world.sending:  # they do not wait for the limit of 30 s
        with pytest.raises(RunError, match="weight sync"):
            future.result(timeout=10)
    with pytest.raises(RunError, match="failed before"):
        world.ranks.senders[0].send("policy", 6)
    with pytest.raises(RunError, match="failed before"):
        next(world.receivers[0].receive(6))


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_a_message_that_is_damaged_on_the_way_is_refused(
    transport: Transport, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_coreward.weights.senders import base

    pack = base.pack

    def damaged(memory: torch.Tensor, *arguments: Any) -> None:
        pack(memory, *arguments)
        memory[64] ^= 1

    monkeypatch.setattr(base, "pack", damaged)
    world = start(transport, CASES["TP 2 to TP 1"])
    with pytest.raises(RunError, match=r"rank \d sent of bucket 0 arrived damaged"):
        world.update(4)[0].result(timeout=20)


def test_without_checksums_none_is_compared(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_coreward.weights import message

    monkeypatch.setattr(message, "crc32", lambda tensor: pytest.fail("a checksum was computed"))
    world = start("gloo", CASES["TP 2 to TP 1"], checksums=False)
    world.check(world.update(4))


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_a_worker_that_fails_half_way_ends_the_transfer_of_all_others(transport: Transport, start: Start) -> None:
    """As when an engine dies: over gloo its connections close, and whoever notices tells the others."""
    world = start(transport, CASES["one rank to three engines"])
    receive = World.receive

    def fail(receiver: Receiver, version: int) -> Any:
        if receiver is world.receivers[1]:
            buckets = receiver.receive(version)
            next(buckets)
            receiver.abandon("out of memory")
            raise InterruptedError
        return receive(world, receiver, version)

    world.receive = fail  # type: ignore[method-assign,assignment]
    begin = time.monotonic()
    first, second, third = world.update(4)
    with pytest.raises(InterruptedError):
        second.result(timeout=20)
    for future in (first, third, *world.sending):
        with pytest.raises(RunError, match="weight sync"):
            future.result(timeout=20)
    assert time.monotonic() - begin < 15  # far below the limit of 30 s


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_the_driver_can_end_a_transfer_in_which_somebody_is_missing(transport: Transport, start: Start) -> None:
    world = start(transport, CASES["TP 2 to TP 1"])
    sending = world.ranks.start(4)  # and no worker comes
    threading.Timer(0.5, give_up, [world.ranks.spec, "engine 0 died"]).start()
    for future in sending:
        with pytest.raises(RunError, match="given up.*engine 0 died"):
            future.result(timeout=10)


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_the_limit_of_a_transfer_does_not_run_while_an_engine_is_still_busy(transport: Transport, start: Start) -> None:
    world = start(transport, CASES["PP 2 to two engines"], timeout_s=1.0)
    sending = world.ranks.start(4)
    first = world.pool.submit(world.receive, world.receivers[0], 4)
    time.sleep(2.0)  # the other engine samples
    assert not any(future.done() for future in (*sending, first))
    world.sending = sending
    world.check([first, world.pool.submit(world.receive, world.receivers[1], 4)])


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_a_party_that_came_and_then_hangs_is_not_waited_for_longer_than_the_limit(
    transport: Transport, start: Start
) -> None:
    world = start(transport, CASES["TP 2 to TP 1"], timeout_s=1.0)
    hung = threading.Event()

    def hang(receiver: Receiver, version: int) -> Any:
        receiver.meeting.everybody("sync 1", 3)
        hung.wait(20)

    world.receive = hang  # type: ignore[method-assign,assignment]
    world.update(4)
    try:
        for future in world.sending:
            with pytest.raises(RunError, match=r"weight sync: .*(took longer than 1 s|is late|given up)"):
                future.result(timeout=15)
    finally:
        hung.set()


def test_while_connections_are_made_everybody_learns_that_one_has_given_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo waits in native code, for as long as the limit, for a process that has gone before it was connected."""
    world = start("gloo", CASES["TP 2 to TP 1"])
    waiting = threading.Event()
    monkeypatch.setattr(groups, "_gloo", lambda *arguments: waiting.wait(20))
    world.update(4)
    threading.Timer(0.5, give_up, [world.ranks.spec, "engine 0 died"]).start()
    begin = time.monotonic()
    for future in world.sending:
        with pytest.raises(RunError, match="given up.*engine 0 died"):
            future.result(timeout=10)
    assert time.monotonic() - begin < 5
    waiting.set()


def test_after_a_failure_no_error_keeps_the_memory_of_messages(start: Start) -> None:
    """Ranks do not collect cycles of garbage by themselves."""
    world = start("gloo", CASES["TP 2 to TP 1"])
    slots: list[weakref.ref[Any]] = []
    send = type(world.ranks.senders[0])._send

    def watch(sender: Any, bucket: int, write: Any) -> None:
        slots.extend(map(weakref.ref, sender._slots))
        send(sender, bucket, write)

    def run(sender: Any, version: int) -> None:
        sender._send = functools.partial(watch, sender)
        with pytest.raises(RunError, match="weight sync"):
            sender.send("policy", version)

    gc.disable()
    try:
        sending = world.ranks.start(4, run)
        received = world.pool.submit(world.receive, world.receivers[0], 6)
        with pytest.raises(RunError, match="expected bucket 0 of version 6"):
            received.result(timeout=20)
        for future in sending:
            future.result(timeout=20)
        for sender in world.ranks.senders:
            del sender._send
        deadline = time.monotonic() + 10  # of gloo's own threads
        while any(slot() is not None for slot in slots) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert slots
        assert all(slot() is None for slot in slots)
    finally:
        gc.enable()


def test_a_store_that_cannot_be_reached_is_an_error_of_the_weight_sync() -> None:
    """Torch's own is a plain RuntimeError, which would end a rank."""
    spec = spec_of("gloo", ActorLayout(), EngineLayout(), free_port(), timeout_s=1.0)
    with pytest.raises(RunError, match="weight sync: rank 0 of the actor cannot be reached at 127.0.0.1"):
        Meeting(spec)


def test_a_rank_that_lacks_what_it_has_to_send_says_so_before_anything_is_sent(start: Start) -> None:
    world = start("gloo", CASES["TP 2 to TP 1"])
    with pytest.raises(ValueError, match=r"rank 0 does not hold .* of 'model.embed_tokens.weight'"):
        open_sender(world.ranks.spec, world.arch, 0, {"policy": []}, torch.device("cpu"))


def test_a_block_that_reads_as_something_else_is_named(start: Start) -> None:
    world = start("shared_memory", CASES["TP 1 to TP 2"])
    world.ranks.tensors["model.norm.weight"] = torch.zeros(8, dtype=torch.int32)
    world.update(4)
    with pytest.raises(ValueError, match="'model.norm.weight': read torch.int32, expected floats"):
        world.sending[0].result(timeout=20)


def test_ranks_send_every_byte_once_to_workers_that_need_the_same(start: Start) -> None:
    """Over gloo, replicas that the ranks serve themselves get the same memory; others get it from each other."""
    world = start("gloo", CASES["one rank to three engines"])
    world.check(world.update(4))
    plan = world.ranks.senders[0].schedule.plan
    assert plan.num_direct == 1
    sender: Any = world.ranks.senders[0]
    model = plan.bytes_received[0, 0]
    headers = sum(2 * 64 for bucket in sender.messages for _ in bucket)
    assert model <= sender.group.bytes_sent <= model + headers
    for receiver, sends in zip(world.receivers, (True, True, False), strict=True):
        group: Any = receiver.group  # type: ignore[attr-defined]
        assert group.bytes_received == sender.group.bytes_sent
        assert group.bytes_sent == (group.bytes_received if sends else 0)
