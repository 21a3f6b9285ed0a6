"""With the experts that another has chosen, every layout computes what transformers computes with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_coreward.actor.microbatch import build_pack
from megatron_coreward.config.architecture import read_architecture
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.types import Sequences, TrainBatch
from tests.actor.test_parity import check, make_batch, plain

pytestmark = pytest.mark.ranks

REPLAY = {"router_replay": "rollout"}
SP2 = {"tensor_parallel": 2, "sequence_parallel": True}
WHOLE = {"expert_tensor_parallel": 1, "expert_parallel": 2}
QUICK = [
    {**SP2, **WHOLE},
    {"pipeline_parallel": 2, "recompute": "full"},
    {"context_parallel": 2, "recompute": "selective"},
]
MORE = [
    {**SP2, "recompute": "selective"},
    {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "full", "tokens_per_microbatch": 64},
    {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "selective"},
    {"data_parallel": 2, "expert_parallel": 2, "recompute": "full"},
]
FOUR = [
    {**SP2, **WHOLE, "pipeline_parallel": 2, "recompute": "full"},
    {**SP2, "context_parallel": 2, **WHOLE, "expert_parallel": 4},
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    return write_model(path, byte_level_tokenizer(), family="qwen3_moe", hidden=64, ffn=96)


@contextmanager
def gates(model: Any, choose: Any) -> Iterator[None]:
    """Lets `choose(layer, own [T, top k])` say which experts the tokens of a sequence go to."""
    routers = [layer.mlp.gate for layer in model.model.layers]

    def patched(layer: int, router: Any, original: Any) -> Any:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, _, own = original(hidden)
            chosen = choose(layer, own)
            weights = logits.softmax(-1).gather(1, chosen)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        return forward

    for layer, router in enumerate(routers):
        router.forward = patched(layer, router, router.forward)
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def random_experts(path: Path, sequences: Sequences) -> list[Any]:
    """[T - 1, layers, top k] for every sequence: which nobody's router would choose."""
    arch, rng = read_architecture(path), np.random.default_rng(3)
    assert arch.experts is not None
    layers, of, top = arch.num_layers, arch.experts.num, arch.experts.top_k
    assert top < of
    return [
        rng.random((len(ids) - 1, layers, of)).argsort(-1)[..., :top].astype(np.uint8) for ids in sequences.token_ids
    ]


def own_experts(path: Path, sequences: Sequences) -> list[Any]:
    """Those that transformers chooses."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    found = []
    for ids in sequences.token_ids:
        chosen: dict[int, Any] = {}
        with torch.no_grad(), gates(model, lambda layer, own, chosen=chosen: chosen.setdefault(layer, own)):
            model(torch.from_numpy(ids).long()[None])
        found.append(torch.stack([chosen[i] for i in range(len(chosen))], dim=1)[:-1].numpy().astype(np.uint8))
    return found


def with_experts(batch: TrainBatch, experts: Sequence[Any]) -> TrainBatch:
    return replace(batch, sequences=replace(batch.sequences, routed_experts=experts))


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, QUICK),
        pytest.param(2, MORE, marks=pytest.mark.slow),
        pytest.param(4, FOUR, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "2 ranks, more", "4 ranks"],
)
def test_the_experts_that_are_replayed_are_those_that_train(
    mixture: Path, ranks: int, layouts: list[dict[str, Any]]
) -> None:
    """Random ones, so that nothing agrees by chance: log-probs, loss, norm, every gradient, the routers' included."""
    batch = make_batch(259)
    experts = random_experts(mixture, batch.sequences)

    def forward(model: Any, tokens: torch.Tensor, sequence: int) -> torch.Tensor:
        asked = torch.from_numpy(experts[sequence]).long()
        with gates(model, lambda layer, own: torch.cat([asked[:, layer], own[-1:]])):
            return plain(model, tokens, sequence)

    check(mixture, with_experts(batch, experts), [REPLAY | layout for layout in layouts], ranks, forward=forward)


def test_replaying_the_routers_own_choice_changes_nothing(mixture: Path) -> None:
    batch = make_batch(259)
    own = with_experts(batch, own_experts(mixture, batch.sequences))
    check(mixture, own, [REPLAY, REPLAY | {"recompute": "full"}], 1)


def test_without_replay_the_router_chooses(mixture: Path) -> None:
    batch = make_batch(259)
    check(mixture, with_experts(batch, random_experts(mixture, batch.sequences)), [{}], 1)


def test_a_pack_has_the_experts_of_each_token_and_none_for_the_last_one() -> None:
    experts = [np.full((n - 1, 3, 2), n, dtype=np.uint8) for n in (3, 5)]
    ids = [np.arange(n, dtype=np.int32) for n in (3, 5)]
    sequences = Sequences(ids, np.ones(2, dtype=np.int32), experts)
    pack = build_pack(sequences, [1, 0], 10, torch.device("cpu"), replayed=[2])
    assert list(pack.experts) == [2]
    assert pack.experts[2][:, 0].tolist() == [5, 5, 5, 5, -1, 3, 3, -1, -1, -1]
    assert build_pack(sequences, [1, 0], 10, torch.device("cpu")).experts == {}
    assert sequences.select([0]).routed_experts == [experts[0]]
