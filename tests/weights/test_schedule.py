"""Messages: what a plan is made of, bucket by bucket, seen alike from both ends."""

from collections import Counter
from itertools import product

import pytest

from megatron_coreward.config.architecture import Architecture
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout
from megatron_coreward.weights.plan import ModelTensors
from megatron_coreward.weights.schedule import HEADER_BYTES, Message, Schedule, slot_bytes, streams
from megatron_coreward.weights.spec import TransferSpec
from tests.weights.architectures import EXPERTS, architecture

MOE = architecture(family="qwen3_moe", experts=EXPERTS)
CASES = {
    "TP 2 x PP 2 to one engine of TP 4": (
        architecture(),
        ActorLayout(tensor_parallel=2, pipeline_parallel=2),
        EngineLayout(1, 4),
    ),
    "TP 2 x DP 2 to four engines": (architecture(), ActorLayout(tensor_parallel=2, data_parallel=2), EngineLayout(4)),
    "EP 2 to TP 2": (MOE, ActorLayout(data_parallel=2, expert_parallel=2), EngineLayout(1, 2)),
    "one rank to three engines, which pass on": (architecture(), ActorLayout(), EngineLayout(3)),
}


def schedule_of(case: str, bucket_bytes: int = 3000) -> Schedule:
    arch, actor, engines = CASES[case]
    return Schedule(actor, engines, ModelTensors(arch, "bfloat16"), bucket_bytes)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_workers_messages_are_its_transfers_row_by_row(case: str) -> None:
    schedule = schedule_of(case)
    assert len(schedule.buckets) > 3
    for engine, worker in product(range(schedule.target.num_engines), range(schedule.target.num_workers)):
        wanted: Counter[object] = Counter()
        for t in schedule.plan.incoming(engine, worker):
            wanted.update((t.rank, t.name, row, t.bounds[1:]) for row in range(*t.bounds[0]))
        found: Counter[object] = Counter()
        for number, bucket in enumerate(schedule.incoming(engine, worker)):
            inside = {(rows.name, row) for rows in schedule.buckets[number] for row in range(rows.start, rows.stop)}
            for message in bucket:
                for part in message.parts:
                    first, last = part.bounds[0]
                    assert first < last
                    assert all((part.name, row) in inside for row in range(first, last))
                    found.update((message.rank, part.name, row, part.bounds[1:]) for row in range(first, last))
        assert found == wanted


@pytest.mark.parametrize("case", CASES)
def test_sender_and_receiver_list_the_same_messages_and_replicas_pass_them_on(case: str) -> None:
    schedule = schedule_of(case)
    num_direct = schedule.plan.num_direct
    sent: list[list[Message]] = [[] for _ in schedule.buckets]
    for rank in range(schedule.source.world_size):
        for mine, of_rank in zip(sent, schedule.outgoing(rank), strict=True):
            mine += of_rank
    received: list[list[Message]] = [[] for _ in schedule.buckets]
    for engine, worker in product(range(schedule.target.num_engines), range(schedule.target.num_workers)):
        incoming = schedule.incoming(engine, worker)
        before = schedule.receives_from(engine)
        assert (before is None) == (engine < num_direct)
        if before is None:
            for mine, of_worker in zip(received, incoming, strict=True):
                mine += of_worker
        else:
            assert schedule.passes_on_to(before) == engine
            passed = schedule.incoming(before, worker)
            assert [[m._replace(engine=engine) for m in bucket] for bucket in passed] == incoming
    assert [sorted(bucket) for bucket in sent] == [sorted(bucket) for bucket in received]


def test_all_stages_and_experts_have_something_to_send_in_every_bucket() -> None:
    actor = ActorLayout(pipeline_parallel=2, data_parallel=2, expert_parallel=2)
    arch = architecture(num_layers=4, family="qwen3_moe", experts=EXPERTS, hidden_size=512, tied=True)
    schedule = Schedule(actor, EngineLayout(), ModelTensors(arch, "float32"), 2**18)
    groups = [streams(actor, arch, schedule.metas, 64)]
    assert [len(of_all) for of_all in groups] == [4]
    assert sum(map(len, groups[0])) == len(schedule.metas)
    busy = [
        sum(1 for rank in range(actor.world_size) if schedule.outgoing(rank)[b]) for b in range(len(schedule.buckets))
    ]
    assert len(busy) > 5
    assert min(busy[:-1]) >= 3


def test_a_slot_holds_any_buckets_messages_with_their_headers() -> None:
    schedule = schedule_of("EP 2 to TP 2")
    incoming = schedule.incoming(0, 1)
    sizes = [sum(message.nbytes for message in bucket) for bucket in incoming]
    assert slot_bytes(incoming) == max(sizes)
    for message in (message for bucket in incoming for message in bucket):
        payload = 2 * sum(part.numel for part in message.parts)
        assert message.nbytes % HEADER_BYTES == 0
        assert HEADER_BYTES + payload <= message.nbytes < 2 * HEADER_BYTES + payload


@pytest.mark.parametrize(("transport", "engines"), [("shared_memory", 1), ("gloo", 3), ("nccl", 3), ("ipc", 3)])
def test_over_shared_memory_all_engines_read_the_same_messages(transport: str, engines: int) -> None:
    arch: Architecture = architecture()
    spec = TransferSpec(transport, "a", ActorLayout(), EngineLayout(3), "float32", 100, 1.0)  # type: ignore[arg-type]
    assert Schedule.of(spec, arch).target.num_engines == engines
    assert TransferSpec.from_json(spec.to_json()) == spec
