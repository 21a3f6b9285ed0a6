"""The two invariants that `weights.mapping` states, for every architecture and layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.config.architecture import Architecture, Experts
from megatron_coreward.weights.mapping import blocks, hf_tensors, is_expert, is_replicated, megatron_parameters
from tests.weights.architectures import EXPERTS, architecture

architectures = st.builds(
    architecture,
    num_layers=st.just(2),
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([4, 12]),  # the rows of the fused QKV divide by every TP size below
    vocab_size=st.integers(1, 700),
    tied=st.booleans(),
    qkv_bias=st.booleans(),
    qk_norm=st.booleans(),
    experts=st.sampled_from([None, EXPERTS]),
)


@given(arch=architectures, tp=st.sampled_from([1, 2, 4, 8]), te=st.booleans(), grouped=st.booleans())
def test_shards_tile_every_hf_tensor_exactly_once(arch: Architecture, tp: int, te: bool, grouped: bool) -> None:
    seen = {name: np.zeros(shape, dtype=int) for name, shape in hf_tensors(arch).items()}
    for name in megatron_parameters(arch, te=te, grouped_experts=grouped):
        for rank in range(1 if is_replicated(name) else tp):
            for block in blocks(name, arch, rank, tp):
                seen[block.hf_name][block.hf_index] += 1
    for name, count in seen.items():
        assert (count == 1).all(), name


@given(arch=architectures, tp=st.sampled_from([1, 2, 4, 8]))
def test_blocks_fill_a_shard_but_for_the_padding_of_the_vocabulary(arch: Architecture, tp: int) -> None:
    shapes = hf_tensors(arch)
    for name in megatron_parameters(arch):
        for rank in range(tp):
            found = blocks(name, arch, rank, tp)
            if not found:
                assert "word_embeddings" in name or "output_layer" in name
                continue
            sizes = [np.empty(shapes[b.hf_name], dtype=np.int8)[b.hf_index].shape for b in found]
            rows = sum(size[0] for size in sizes)
            shard = np.zeros((rows, *sizes[0][1:]), dtype=int)
            for block, size in zip(found, sizes, strict=True):
                assert shard[block.shard_index].shape == size, name
                shard[block.shard_index] += 1
            assert (shard == 1).all(), name


def test_the_fused_qkv_lies_by_query_group() -> None:
    arch = architecture(num_heads=4, num_kv_heads=2, head_dim=3)
    runs = [
        (b.hf_name.split(".")[-2], b.hf_index[0].start, b.hf_index[0].stop, b.shard_index[0].start)
        for b in blocks("decoder.layers.1.self_attention.linear_qkv.weight", arch)
    ]
    assert runs == [
        ("q_proj", 0, 6, 0),
        ("k_proj", 0, 3, 6),
        ("v_proj", 0, 3, 9),
        ("q_proj", 6, 12, 12),
        ("k_proj", 3, 6, 18),
        ("v_proj", 3, 6, 21),
    ]


def test_gate_and_up_are_cut_on_their_own() -> None:
    found = blocks("decoder.layers.0.mlp.linear_fc1.weight", architecture(ffn_size=16), 1, 2)
    assert [(b.hf_name.split(".")[-2], b.hf_index[0], b.shard_index[0]) for b in found] == [
        ("gate_proj", slice(8, 16), slice(0, 8)),
        ("up_proj", slice(8, 16), slice(8, 16)),
    ]


def test_both_spellings_of_an_expert_are_one_tensor() -> None:
    arch = architecture(experts=Experts(4, 2, 8, True))
    grouped = blocks("decoder.layers.0.mlp.experts.linear_fc2.weight3", arch)
    assert grouped == blocks("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight", arch)
    assert grouped[0].hf_name == "model.layers.0.mlp.experts.3.down_proj.weight"
    assert is_expert("decoder.layers.0.mlp.experts.linear_fc2.weight3")
    assert not is_expert("decoder.layers.0.mlp.router.weight")


@pytest.mark.parametrize("name", ["decoder.layers.0.mlp.linear_fc3.weight", "embedding.position_embeddings.weight"])
def test_unknown_parameters_are_named(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        blocks(name, architecture())
