"""Elements on a rank: together the ranks hold the model, and buffers are cut evenly."""

from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_coreward.planner.models import CONFIGS, published_architecture
from megatron_coreward.planner.parameters import lay_out, stage_parameters
from megatron_coreward.planner.step_time import num_parameters
from megatron_coreward.weights.layouts import ActorLayout


@given(
    buckets=st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=8), min_size=1, max_size=3),
    ranks=st.integers(1, 12),
)
def test_shards_are_the_parameters_and_nothing_else(buckets: list[list[int]], ranks: int) -> None:
    buffer = lay_out(buckets, ranks)
    assert sum(buffer.owned) == sum(map(sum, buckets))
    assert buffer.numel % lcm(ranks, 128) == 0
    assert all(0 <= owned <= buffer.numel // ranks for owned in buffer.owned)
    padding = sum(64 * len(bucket) + lcm(ranks, 128) for bucket in buckets)
    assert buffer.numel < sum(map(sum, buckets)) + padding


@given(numels=st.lists(st.integers(1, 500), min_size=1, max_size=8), ranks=st.integers(1, 12))
def test_every_rank_owns_what_lies_in_its_part_of_the_buffer(numels: list[int], ranks: int) -> None:
    buffer, start, inside = lay_out([numels], ranks), 0, set()
    for numel in numels:
        start = -(-start // 64) * 64
        inside |= set(range(start, start + numel))
        start += numel
    share = buffer.numel // ranks
    expected = [sum(rank * share <= place < (rank + 1) * share for place in inside) for rank in range(ranks)]
    assert list(buffer.owned) == expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "ep", "dp"), [(1, 1, 1, 1, 1), (2, 2, 1, 1, 2), (4, 1, 1, 1, 8), (1, 2, 1, 4, 8)]
)
def test_the_shards_of_all_ranks_are_the_model(name: str, tp: int, pp: int, vpp: int, ep: int, dp: int) -> None:
    arch = published_architecture(name)
    layout = ActorLayout(tp, pp, vpp, ep if arch.experts else 1, data_parallel=dp)
    held = [stage_parameters(arch, layout, stage) for stage in range(pp)]
    dense = sum(sum(s.dense_owned) for s in held) * tp
    experts = sum(sum(s.expert_owned) for s in held) * tp * layout.expert_parallel
    h, d = arch.hidden_size, arch.head_dim
    whole = 2 * h + (2 * d if arch.qk_norm else 0) + (h * arch.experts.num if arch.experts else 0)  # on every TP rank
    repeated = (tp - 1) * (arch.num_layers * whole + h)
    vocabulary = (arch.padded_vocab_size(tp) - arch.vocab_size) * h * (1 if arch.tied else 2)
    if arch.tied and pp > 1:
        vocabulary += arch.padded_vocab_size(tp) * h  # the last stage's copy
    assert dense + experts == num_parameters(arch) + repeated + vocabulary
