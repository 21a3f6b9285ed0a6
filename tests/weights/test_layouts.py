"""Who holds and who needs what: against the tables, and against Megatron's and vLLM's own arithmetic."""

from collections import Counter
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_coreward.config.architecture import Architecture, Experts
from megatron_coreward.errors import InputError
from megatron_coreward.weights.buckets import TensorMeta, check_tiling
from megatron_coreward.weights.layouts import ActorLayout, EngineLayout, HFBlock
from megatron_coreward.weights.mapping import hf_tensors
from tests.weights.architectures import EXPERTS, architecture

ACTORS = [
    ActorLayout(tp, pp, vpp, ep, etp, dp, cp)
    for tp, (pp, vpp), (ep, etp), dp, cp in product(
        (1, 2, 4), ((1, 1), (2, 1), (2, 2)), ((1, None), (2, None), (2, 1), (4, 1)), (1, 2, 3, 4), (1, 2)
    )
    if (tp * dp * cp) % (ep * (tp if etp is None else etp)) == 0
]


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_ranks_hold_every_tensor_once_but_for_as_many_copies_as_there_are_replicas(
    experts: Experts | None, tied: bool
) -> None:
    arch = architecture(tied=tied, qkv_bias=True, experts=experts)
    metas = [TensorMeta(name, shape, "float32") for name, shape in hf_tensors(arch).items()]
    for layout in ACTORS:
        if experts is None and layout.expert_parallel > 1:
            continue
        copies = Counter(block for rank in range(layout.world_size) for block in layout.held(rank, arch))
        check_tiling(metas, [(name, tuple(slice(*cut) for cut in bounds)) for name, bounds in copies])
        replicas = layout.data_parallel * layout.context_parallel
        for block, found in copies.items():
            expected = replicas
            if "norm" in block.name or ".gate." in block.name:
                expected = replicas * layout.tensor_parallel
            elif ".experts." in block.name:
                expected = layout.expert_dp_size
            elif "embed" in block.name and tied and layout.pipeline_parallel > 1:
                expected = 2 * replicas
            assert found == expected, (layout, block)


def test_shards_and_holders_say_the_same_as_what_single_ranks_hold() -> None:
    arch = architecture(num_layers=1, experts=EXPERTS)
    parameters = ["embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"]
    for layout in ACTORS:
        if layout.pipeline_parallel > 1:
            continue
        held: dict[int, list[HFBlock]] = {rank: [] for rank in range(layout.world_size)}
        prefix = "decoder.layers.0."
        names = [f"{prefix}self_attention.linear_{kind}.weight" for kind in ("qkv", "proj")]
        names += [f"{prefix}{kind}.weight" for kind in ("input_layernorm", "pre_mlp_layernorm", "mlp.router")]
        names += [f"{prefix}self_attention.{kind}_layernorm.weight" for kind in "qk"]
        names += [f"{prefix}mlp.experts.local_experts.{e}.linear_fc{i}.weight" for e in range(4) for i in (1, 2)]
        for shard in layout.shards(parameters + names, arch):
            for rank in shard.holders:
                held[rank] += shard.blocks
        for rank, blocks in held.items():
            assert sorted(blocks) == sorted(layout.held(rank, arch))


def test_interleaved_chunks_take_turns_and_outer_stages_may_be_smaller() -> None:
    assert ActorLayout(pipeline_parallel=2, virtual_pipeline=2).chunks(8) == (
        (range(0, 2), range(4, 6)),
        (range(2, 4), range(6, 8)),
    )
    sizes = [
        len(r) for (r,) in ActorLayout(pipeline_parallel=8, first_stage_layers=11, last_stage_layers=11).chunks(94)
    ]
    assert sizes == [11, *[12] * 6, 11]


def test_ranks_lie_and_layers_are_cut_as_megatron_does_it() -> None:
    from megatron.core.parallel_state import RankGenerator
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    for layout in ACTORS:
        places = [layout.place(rank) for rank in range(layout.world_size)]
        sizes = {"tp": layout.tensor_parallel, "cp": layout.context_parallel, "dp": layout.data_parallel, "ep": 1}
        pp = layout.pipeline_parallel
        for token in ("tp", "cp", "dp", "pp"):
            groups = RankGenerator(**sizes, pp=pp, order="tp-cp-ep-dp-pp").get_ranks(token)
            assert all([getattr(places[rank], token) for rank in g] == list(range(len(g))) for g in groups)
        sizes = {"tp": layout.expert_tp_size, "cp": 1, "dp": layout.expert_dp_size, "ep": layout.expert_parallel}
        for token, axis in (("tp", "expert_tp"), ("ep", "ep"), ("dp", "expert_dp"), ("pp", "pp")):
            groups = RankGenerator(**sizes, pp=pp, order="tp-cp-ep-dp-pp").get_ranks(token)
            assert all([getattr(places[rank], axis) for rank in g] == list(range(len(g))) for g in groups)

    for pp, vpp, first, last, layers in product((2, 4), (1, 2), (None, 2, 4), (None, 4), (8, 12, 16, 20)):
        if vpp > 1 and pp == 2 and first and last:
            continue  # Megatron 0.16.1 divides by the number of stages between first and last
        layout = ActorLayout(
            pipeline_parallel=pp, virtual_pipeline=vpp, first_stage_layers=first, last_stage_layers=last
        )
        config: Any = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
            pipeline_model_parallel_layout=None,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )
        try:
            chunks = layout.chunks(layers)
        except InputError:
            continue
        for stage, found in enumerate(chunks):
            for chunk, numbers in enumerate(found):
                vp_stage = chunk if vpp > 1 else None
                start = get_transformer_layer_offset(config, vp_stage, stage)
                assert numbers == range(start, start + get_num_layers_to_build(config, vp_stage, stage)), layout


@pytest.mark.engine
def test_workers_need_the_layers_rows_and_experts_that_vllm_gives_them() -> None:
    from vllm.distributed.utils import get_pp_indices
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding, pad_vocab_size

    for layers, pp in product(range(1, 20), (1, 2, 3, 4, 5, 8)):
        found = EngineLayout(pipeline_parallel=pp).stage_layers(layers)
        assert found == tuple(range(*get_pp_indices(layers, stage, pp)) for stage in range(pp)), (layers, pp)

    for vocabulary, tp in product((1, 63, 64, 65, 131, 1000), (1, 2, 4, 8)):
        padded, layout = pad_vocab_size(vocabulary), EngineLayout(tensor_parallel=tp)
        for rank in range(tp):
            rows = VocabParallelEmbedding._get_indices(padded, padded, vocabulary, vocabulary, rank, tp)
            part = layout.part("lm_head.weight", (vocabulary, 5), rank, architecture())
            start, stop = part[0] if part else (vocabulary, vocabulary)
            assert (start, stop) == (rows.org_vocab_start_index, rows.org_vocab_end_index)

    for num, tp in ((4, 2), (5, 2), (8, 8), (13, 4)):
        arch = architecture(experts=Experts(num, 2, 8, True))
        layout = EngineLayout(tensor_parallel=tp, expert_parallel=True)
        for rank in range(tp):
            _, numbers, _ = determine_expert_map(tp, rank, num)
            assert numbers is not None
            for e in range(num):
                part = layout.part(f"model.layers.0.mlp.experts.{e}.up_proj.weight", (8, 24), rank, arch)
                assert (part == ((0, 8), (0, 24))) == (numbers[e] >= 0)


@pytest.mark.parametrize(("tp", "pp"), product((1, 2, 4, 8), (1, 2, 3)))
@pytest.mark.parametrize("experts", [None, EXPERTS])
def test_the_workers_of_an_engine_need_every_element_once_or_whole(tp: int, pp: int, experts: Experts | None) -> None:
    if experts and tp > experts.num:
        pytest.skip("vLLM refuses more workers than experts")
    arch = architecture(experts=experts, family="qwen3_moe" if experts else "qwen3", tied=tp == 2)
    for expert_parallel in (False, True) if experts else (False,):
        layout = EngineLayout(1, tp, pp, expert_parallel)
        layout.check(arch)
        count = {name: np.zeros(shape, dtype=int) for name, shape in hf_tensors(arch).items()}
        for worker in range(layout.num_workers):
            for name, bounds in layout.needed(worker, arch):
                count[name][tuple(slice(*cut) for cut in bounds)] += 1
        for name, seen in count.items():
            expected = 1
            if "norm" in name or ".gate." in name:
                expected = tp
            elif ".k_proj." in name or ".v_proj." in name:
                expected = max(1, tp // arch.num_kv_heads)
            if ".layers." not in name and (experts or (arch.tied and "embed" in name and pp > 1)):
                expected *= pp if experts else 2
            assert (seen == expected).all(), name


def test_key_value_heads_are_copied_where_workers_outnumber_them() -> None:
    arch, name = architecture(num_heads=8, num_kv_heads=2, head_dim=6), "model.layers.1.self_attn.k_proj.weight"
    heads = [dict(EngineLayout(1, 4).needed(worker, arch))[name] for worker in range(4)]
    assert heads == [((0, 6), (0, 24)), ((0, 6), (0, 24)), ((6, 12), (0, 24)), ((6, 12), (0, 24))]


def test_a_tied_head_is_not_sent_and_the_last_stage_gets_the_embedding() -> None:
    names = [
        {name for name, _ in EngineLayout(pipeline_parallel=3).needed(worker, architecture(tied=True))}
        for worker in range(3)
    ]
    assert ["model.embed_tokens.weight" in found for found in names] == [True, False, True]
    assert not any("lm_head.weight" in found for found in names)


@pytest.mark.parametrize(
    ("make", "arch", "complaint"),
    [
        (lambda: ActorLayout(tensor_parallel=0), None, "actor.tensor_parallel: 0; must be at least 1"),
        (lambda: ActorLayout(virtual_pipeline=2), None, "actor.virtual_pipeline: 2 needs actor.pipeline_parallel"),
        (lambda: ActorLayout(first_stage_layers=1), None, "actor.first_stage_layers: 1 needs actor.pipeline_parallel"),
        (
            lambda: ActorLayout(expert_parallel=2),
            None,
            "actor.expert_parallel x .*: 2 does not divide the ranks",
        ),
        (lambda: ActorLayout(tensor_parallel=3), architecture(), "actor.tensor_parallel: 3 .* attention heads"),
        (lambda: ActorLayout(tensor_parallel=2), architecture(num_kv_heads=3, num_heads=6), "key/value heads .3."),
        (lambda: ActorLayout(tensor_parallel=8), architecture(head_dim=5, ffn_size=8), "fused QKV .60."),
        (lambda: ActorLayout(tensor_parallel=2), architecture(ffn_size=15), "feed-forward size .15."),
        (lambda: ActorLayout(pipeline_parallel=3), architecture(), "4 layers do not divide over 3 stages"),
        (lambda: ActorLayout(pipeline_parallel=2, first_stage_layers=5), architecture(), "after 5 of the first"),
        (lambda: ActorLayout(pipeline_parallel=2, virtual_pipeline=3), architecture(), "actor.virtual_pipeline: 3"),
        (lambda: ActorLayout(data_parallel=2, expert_parallel=2), architecture(), "a model without experts"),
        (lambda: ActorLayout(data_parallel=3, expert_parallel=3), architecture(experts=EXPERTS), "model's experts .4."),
        (
            lambda: ActorLayout(data_parallel=3, expert_tensor_parallel=3),
            architecture(experts=EXPERTS),
            "actor.expert_tensor_parallel: 3 .* feed-forward size .8.",
        ),
        (lambda: EngineLayout(num_engines=0), None, "rollout.num_engines: 0"),
        (lambda: EngineLayout(tensor_parallel=3), architecture(), "rollout.tensor_parallel: 3 .* attention heads"),
        (lambda: EngineLayout(tensor_parallel=2), architecture(ffn_size=15), "feed-forward size .15."),
        (
            lambda: EngineLayout(tensor_parallel=3),
            architecture(num_heads=3, num_kv_heads=3, vocab_size=100),
            "vocabulary as vLLM pads it .128.",
        ),
        (lambda: EngineLayout(pipeline_parallel=5), architecture(), "rollout.pipeline_parallel: 5 stages for 4 layers"),
        (lambda: EngineLayout(expert_parallel=True), architecture(), "rollout.expert_parallel: true"),
        (lambda: EngineLayout(tensor_parallel=8), architecture(experts=EXPERTS), "8 is more than the model's experts"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_the_key(make: Any, arch: Architecture | None, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        make().check(arch)


def test_ranks_and_workers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(IndexError, match="rank 2 does not exist; there are 2"):
        ActorLayout(data_parallel=2).place(2)
    with pytest.raises(IndexError, match="worker 2 does not exist; an engine has 2"):
        next(EngineLayout(num_engines=3, tensor_parallel=2).needed(2, architecture()))


def test_a_tensor_that_the_table_does_not_know_is_an_error() -> None:
    with pytest.raises(KeyError, match="gate_up_proj"):
        EngineLayout().part("model.layers.0.mlp.gate_up_proj.weight", (4, 4), 0, architecture())
