"""The invariants that `weights.plan` states, over many pairs of layouts."""

from collections import defaultdict
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_coreward.config.architecture import Architecture, Experts
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import ITEM_BYTES
from megatron_coreward.weights.layouts import ActorLayout, Bounds, EngineLayout
from megatron_coreward.weights.mapping import hf_tensors
from megatron_coreward.weights.plan import ModelTensors, Transfer, TransferPlan, plan_transfers
from tests.weights.architectures import EXPERTS, architecture

DENSE = [
    architecture(),
    architecture(tied=True, num_kv_heads=8),
    architecture(family="qwen2", qkv_bias=True, qk_norm=False, num_kv_heads=1, vocab_size=513),
    architecture(family="llama", tied=True, qk_norm=False, num_kv_heads=4),
]
MOE = [
    architecture(family="qwen3_moe", experts=EXPERTS),
    architecture(family="qwen3_moe", experts=EXPERTS, tied=True, num_kv_heads=4),
]
STAGES = ((1, 1), (2, 1), (2, 2))  # pipeline stages, model chunks
DENSE_ACTORS = [
    ActorLayout(tp, pp, vpp, data_parallel=dp) for tp, (pp, vpp), dp in product((1, 2, 4), STAGES, (1, 2, 3))
]
MOE_ACTORS = [
    ActorLayout(tp, pp, vpp, expert_parallel=ep, expert_tensor_parallel=etp, data_parallel=dp)
    for tp, (pp, vpp), (ep, etp), dp in product((1, 2), STAGES, ((1, None), (2, None), (2, 1), (4, 1)), (1, 2, 4))
    if tp * dp % (ep * (tp if etp is None else etp)) == 0
]


def inside(bounds: Bounds, outer: Bounds) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, bounds, strict=True))


def check_coverage(plan: TransferPlan) -> None:
    """Every element that a worker needs comes once, no other does, and the sums say so."""
    arch, item = plan.tensors.arch, ITEM_BYTES[plan.tensors.dtype]
    shapes = hf_tensors(arch)
    total = 0
    for worker in range(plan.target.num_workers):
        needed = {name: np.zeros(shapes[name], dtype=np.int8) for name, _ in plan.target.needed(worker, arch)}
        for name, bounds in plan.target.needed(worker, arch):
            needed[name][tuple(slice(*cut) for cut in bounds)] = 1
        for engine in range(plan.target.num_engines):
            missing = {name: wanted.copy() for name, wanted in needed.items()}
            for transfer in plan.incoming(engine, worker):
                missing[transfer.name][transfer.index] -= 1
                assert transfer.nbytes == prod(b - a for a, b in transfer.bounds) * item
            assert not any(left.any() for left in missing.values())
            wanted_bytes = sum(int(wanted.sum()) for wanted in needed.values()) * item
            assert plan.bytes_received[engine, worker] == wanted_bytes
            total += wanted_bytes
    assert plan.total_bytes == plan.bytes_sent.sum() + plan.bytes_passed_on.sum() == total


def check_senders(plan: TransferPlan) -> None:
    """Every sender holds what it sends in one of its blocks."""
    for rank in range(plan.source.world_size):
        held = defaultdict(list)
        for name, bounds in plan.source.held(rank, plan.tensors.arch):
            held[name].append(bounds)
        for transfer in plan.outgoing(rank):
            assert transfer.rank == rank
            assert any(inside(transfer.bounds, block) for block in held[transfer.name]), transfer


def check_both_sides(plan: TransferPlan) -> None:
    """Sender and receiver have the same list for the link between them, in HF order, and the sums fit."""
    ranks, engines, workers = (range(size) for size in plan.bytes_by_link.shape)
    sent: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    received: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    order = {name: number for number, name in enumerate(hf_tensors(plan.tensors.arch))}
    for rank in ranks:
        outgoing = list(plan.outgoing(rank))
        assert outgoing == sorted(outgoing, key=lambda t: (order[t.name], t.engine, t.worker, t.bounds))
        for transfer in outgoing:
            sent[transfer.rank, transfer.engine, transfer.worker].append(transfer)
    for engine, worker in product(engines, workers):
        incoming = list(plan.incoming(engine, worker))
        assert {transfer.via for transfer in incoming} <= {None}
        assert incoming == sorted(incoming, key=lambda t: (order[t.name], t.bounds))
        for transfer in incoming:
            assert (transfer.engine, transfer.worker) == (engine, worker)
            received[transfer.rank, engine, worker].append(transfer)
    assert sent == received
    by_link = np.zeros_like(plan.bytes_by_link)
    for link, transfers in sent.items():
        by_link[link] = sum(transfer.nbytes for transfer in transfers)
    assert (by_link == plan.bytes_by_link).all()


def check_balance(plan: TransferPlan) -> None:
    """The stated bound, the replica groups against what the ranks hold, and 1.2 wherever rows are fine enough."""
    groups = defaultdict(list)
    for rank in range(plan.source.world_size):
        groups[tuple(plan.source.held(rank, plan.tensors.arch))].append(rank)
    assert sorted(plan.replica_groups) == sorted(map(tuple, groups.values()))
    assert (np.abs(plan.bytes_sent - plan.fair_bytes) <= plan.slack_bytes + 1e-6).all()
    worst = max(
        max(plan.bytes_sent[g]) / np.mean(plan.bytes_sent[g]) for g in groups.values() if plan.bytes_sent[g].any()
    )
    assert plan.sender_imbalance == pytest.approx(worst)
    for group in groups.values():
        assert plan.fair_bytes[group] == pytest.approx(plan.fair_bytes[group[0]])
    if (plan.slack_bytes * 11 < plan.fair_bytes).all():
        assert plan.sender_imbalance < 1.2


def check_links(plan: TransferPlan) -> None:
    """No link carries much more than it has to in any plan, wherever rows are fine enough."""
    assert (plan.bytes_passed_on <= plan.bytes_received).all()
    if (plan.slack_bytes * 11 < plan.fair_bytes).all():
        assert plan.busiest_bytes <= 1.2 * plan.least_busiest_bytes


def check(plan: TransferPlan) -> None:
    check_coverage(plan)
    check_links(plan)
    check_senders(plan)
    check_both_sides(plan)
    check_balance(plan)


@pytest.mark.parametrize("actor", DENSE_ACTORS, ids=str)
def test_dense_models_between_many_layouts(actor: ActorLayout) -> None:
    targets = list(product((1, 2, 3), (1, 2, 4), (1, 2)))
    turn = DENSE_ACTORS.index(actor)
    for number, (engines, tp, pp) in enumerate(targets[turn % 2 :: 2]):
        arch = DENSE[(number + turn // 2) % len(DENSE)]
        plan = plan_transfers(actor, EngineLayout(engines, tp, pp), ModelTensors(arch))
        check(plan)
        assert plan.sender_imbalance <= 1.2


@pytest.mark.parametrize("actor", MOE_ACTORS, ids=str)
def test_mixtures_of_experts_between_many_layouts(actor: ActorLayout) -> None:
    targets = [(e, tp, pp, ep) for e, tp, pp in product((1, 3), (1, 2, 4), (1, 2)) for ep in (False, True)]
    for number, (engines, tp, pp, expert_parallel) in enumerate(targets[MOE_ACTORS.index(actor) % 4 :: 4]):
        arch = MOE[number % len(MOE)]
        plan = plan_transfers(actor, EngineLayout(engines, tp, pp, expert_parallel), ModelTensors(arch))
        check(plan)
        assert plan.sender_imbalance <= 1.2


@pytest.mark.long
@given(data=st.data())
def test_any_model_between_any_layouts(data: st.DataObject) -> None:
    experts = data.draw(st.sampled_from([None, Experts(3, 1, 4, True), Experts(6, 2, 12, True)]))
    arch = architecture(
        family="qwen3" if experts is None else "qwen3_moe",
        num_layers=data.draw(st.integers(1, 5)),
        hidden_size=data.draw(st.integers(1, 20)),
        num_kv_heads=data.draw(st.sampled_from([1, 2, 4, 8])),
        head_dim=data.draw(st.sampled_from([1, 2, 5])),
        ffn_size=data.draw(st.sampled_from([4, 12])),
        vocab_size=data.draw(st.integers(1, 600)),
        tied=data.draw(st.booleans()),
        qkv_bias=data.draw(st.booleans()),
        experts=experts,
    )
    sizes = st.sampled_from([1, 1, 2, 3, 4])
    numbers = [data.draw(sizes) for _ in range(8)]
    tp, pp, dp, cp, ep, engines, target_tp, target_pp = numbers
    try:
        actor = ActorLayout(tp, pp, 1, ep if experts else 1, None, dp, min(cp, 2))
        target = EngineLayout(engines, target_tp, target_pp, experts is not None and data.draw(st.booleans()))
        plan = plan_transfers(actor, target, ModelTensors(arch, data.draw(st.sampled_from(sorted(ITEM_BYTES)))))
    except InputError:
        assume(False)
    check(plan)


def test_uneven_stages_and_chunks() -> None:
    actor = ActorLayout(2, 3, 2, data_parallel=2, first_stage_layers=2, last_stage_layers=4)
    check(plan_transfers(actor, EngineLayout(3, 2, 3), ModelTensors(architecture(num_layers=14))))


def test_copies_serve_whole_engines_where_their_number_divides_that_of_the_engines() -> None:
    plan = plan_transfers(
        ActorLayout(tensor_parallel=2, data_parallel=2), EngineLayout(4), ModelTensors(architecture(vocab_size=256))
    )
    big = [t for rank in range(4) for t in plan.outgoing(rank) if t.name == "model.layers.2.mlp.down_proj.weight"]
    assert [(t.rank, t.engine, t.worker, t.bounds) for t in big] == [
        (rank, engine, 0, ((0, 24), (rank % 2 * 8, rank % 2 * 8 + 8)))
        for rank in range(4)
        for engine in ((0, 1), (2, 3))[rank // 2]
    ]


def test_a_large_block_is_cut_by_rows_where_one_engine_has_several_copies_to_draw_from() -> None:
    arch = architecture(num_layers=1, hidden_size=64, ffn_size=256)
    plan = plan_transfers(ActorLayout(data_parallel=3), EngineLayout(), ModelTensors(arch))
    senders = defaultdict(set)
    for transfer in plan.incoming(0, 0):
        senders[transfer.name].add(transfer.rank)
    assert senders["model.embed_tokens.weight"] == {0, 1, 2}
    assert {rank for name, ranks in senders.items() if ".layers.0." in name for rank in ranks} == {0, 1, 2}
    assert plan.sender_imbalance < 1.01


@pytest.mark.parametrize(("engines", "copies"), [(1, 2), (1, 3), (3, 2), (5, 4), (7, 3), (4, 8)])
def test_all_copies_are_busy_in_every_layer(engines: int, copies: int) -> None:
    arch = architecture(hidden_size=64, head_dim=8, ffn_size=128, experts=Experts(4, 2, 32, True), family="qwen3_moe")
    actor = ActorLayout(2, expert_parallel=2, data_parallel=2 * copies)
    plan = plan_transfers(actor, EngineLayout(engines, 2), ModelTensors(arch))
    sent: dict[str, dict[int, int]] = defaultdict(lambda: dict.fromkeys(range(actor.world_size), 0))
    for rank in range(actor.world_size):
        for transfer in plan.outgoing(rank):
            if ".layers." in transfer.name:
                sent[transfer.name.split(".")[2]][rank] += transfer.nbytes
    assert len(sent) == arch.num_layers
    for loads in sent.values():
        for group in plan.replica_groups:
            load = [loads[rank] for rank in group]
            assert max(load) <= 1.1 * np.mean(load)


@pytest.mark.parametrize(("tp", "dp", "engines", "target_tp"), [(4, 2, 4, 2), (2, 2, 4, 4), (4, 1, 3, 1), (8, 2, 6, 2)])
def test_norms_open_no_links_of_their_own(tp: int, dp: int, engines: int, target_tp: int) -> None:
    arch = architecture(num_kv_heads=8, hidden_size=64, vocab_size=1024)  # no rank has the vocabulary alone
    plan = plan_transfers(ActorLayout(tp, 2, data_parallel=dp), EngineLayout(engines, target_tp), ModelTensors(arch))
    links: dict[bool, set[tuple[int, int, int]]] = {False: set(), True: set()}
    for rank in range(plan.source.world_size):
        for t in plan.outgoing(rank):
            links["norm" in t.name].add((t.rank, t.engine, t.worker))
    assert links[True] <= links[False]


def test_a_tied_embedding_comes_from_both_stages_that_have_it_and_is_sent_under_one_name() -> None:
    plan = plan_transfers(ActorLayout(pipeline_parallel=2), EngineLayout(2), ModelTensors(architecture(tied=True)))
    senders = {(t.engine, t.rank, t.bounds[0]) for e in (0, 1) for t in plan.incoming(e, 0) if "embed_tokens" in t.name}
    assert senders == {(0, 0, (0, 131)), (1, 1, (0, 131))}
    assert not any(t.name == "lm_head.weight" for rank in (0, 1) for t in plan.outgoing(rank))


LLAMA_70B = architecture(
    family="llama",
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=28672,
    vocab_size=128256,
    qk_norm=False,
)
QWEN3_235B = architecture(
    family="qwen3_moe",
    num_layers=94,
    hidden_size=4096,
    num_heads=64,
    num_kv_heads=4,
    head_dim=128,
    ffn_size=12288,
    vocab_size=151936,
    experts=Experts(128, 8, 1536, True),
)


@pytest.mark.parametrize(
    ("arch", "actor", "engines"),
    [
        (LLAMA_70B, ActorLayout(8, 8, data_parallel=4), EngineLayout(64, 4)),
        (LLAMA_70B, ActorLayout(8, 8, data_parallel=3), EngineLayout(7, 16, 2)),
        (
            QWEN3_235B,
            ActorLayout(4, 8, 1, 8, data_parallel=8, first_stage_layers=11, last_stage_layers=11),
            EngineLayout(32, 8),
        ),
        (QWEN3_235B, ActorLayout(4, 2, 1, 8, data_parallel=24), EngineLayout(5, 8, 2, True)),
    ],
)
def test_large_models_are_planned_from_their_sums(
    arch: Architecture, actor: ActorLayout, engines: EngineLayout
) -> None:
    plan = plan_transfers(actor, engines, ModelTensors(arch))
    for worker in range(engines.num_workers):
        wanted = 2 * sum(prod(b - a for a, b in bounds) for _, bounds in engines.needed(worker, arch))
        assert (plan.bytes_received[:, worker] == wanted).all()
    assert plan.sender_imbalance < 1.01
    assert (np.abs(plan.bytes_sent - plan.fair_bytes) <= plan.slack_bytes + 1e-6 * plan.fair_bytes).all()
    last = actor.world_size - 1
    assert sum(t.nbytes for t in plan.incoming(0, 0)) == plan.bytes_received[0, 0]
    assert next(plan.outgoing(last)).name.startswith("model.layers.")


REPLICAS = {
    "one rank, four engines": (ActorLayout(), EngineLayout(4)),
    "TP 2, eight engines": (ActorLayout(tensor_parallel=2), EngineLayout(8)),
    "TP 2 x PP 2, five engines of TP 2": (ActorLayout(tensor_parallel=2, pipeline_parallel=2), EngineLayout(5, 2)),
    "DP 2, seven engines": (ActorLayout(data_parallel=2), EngineLayout(7)),
}


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_pass_on_so_that_no_link_carries_much_more_than_it_must(case: str) -> None:
    actor, engines = REPLICAS[case]
    plan = plan_transfers(actor, engines, ModelTensors(architecture()))
    assert plan.num_direct < engines.num_engines
    assert plan.busiest_bytes <= 1.2 * plan.least_busiest_bytes
    assert (plan.bytes_passed_on <= plan.bytes_received).all()
    assert plan.bytes_sent.sum() + plan.bytes_passed_on.sum() == plan.total_bytes == plan.bytes_received.sum()
    for engine in range(engines.num_engines):
        for worker in range(engines.num_workers):
            mine = list(plan.incoming(engine, worker))
            assert sum(t.nbytes for t in mine) == plan.bytes_received[engine, worker]
            if engine < plan.num_direct:
                assert {t.via for t in mine} == {None}
            else:  # the very transfers of the engine that passes them on
                via = engine - plan.num_direct
                told = [replace(t, engine=via, via=None) for t in mine]
                assert told == [replace(t, via=None) for t in plan.incoming(via, worker)]
    sent = [t for rank in range(actor.world_size) for t in plan.outgoing(rank)]
    assert {t.engine for t in sent} == set(range(plan.num_direct))


def test_engines_that_the_ranks_can_serve_receive_from_ranks() -> None:
    plan = plan_transfers(
        ActorLayout(tensor_parallel=2, data_parallel=2), EngineLayout(4), ModelTensors(architecture(vocab_size=256))
    )
    assert plan.num_direct == 4
    assert plan.num_hops == 1


def test_seconds_are_those_of_the_busiest_rank_or_worker() -> None:
    fan_out = plan_transfers(ActorLayout(), EngineLayout(1, 2), ModelTensors(architecture()))
    assert fan_out.seconds(10.0) == fan_out.bytes_sent[0] / 10
    fan_in = plan_transfers(ActorLayout(data_parallel=3), EngineLayout(), ModelTensors(architecture()))
    assert fan_in.seconds(10.0) == fan_in.bytes_received[0, 0] / 10


def test_bad_input_is_named() -> None:
    arch = architecture()
    with pytest.raises(InputError, match="'int4'; allowed: float64, float32"):
        ModelTensors(arch, "int4")
    with pytest.raises(InputError, match="actor.tensor_parallel: 3"):
        plan_transfers(ActorLayout(3), EngineLayout(), ModelTensors(arch))
    with pytest.raises(InputError, match="rollout.tensor_parallel: 3"):
        plan_transfers(ActorLayout(), EngineLayout(1, 3), ModelTensors(arch))
    plan = plan_transfers(ActorLayout(), EngineLayout(), ModelTensors(arch))
    for listing, complaint in (
        (plan.outgoing(1), "rank 1 does not exist"),
        (plan.incoming(1, 0), "engine 1 does not exist"),
        (plan.incoming(0, -1), "worker -1 does not exist"),
    ):
        with pytest.raises(IndexError, match=complaint):
            next(listing)
