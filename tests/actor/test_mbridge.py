"""An independent converter, mbridge, makes the same parameters of a model's files as the actor does, bit by bit.

It is no dependency: `pip install --no-deps mbridge` (0.15.1 was compared with). Without it, these tests are skipped.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor.mbridge_on_ranks import unlike_mbridge
from tests.actor.ranks import free_port, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mbridge") is None, reason="mbridge is not installed"),
]

TP2, PP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
UNEVEN = PP2 | {"first_stage_layers": 3, "last_stage_layers": 1}
SP2 = TP2 | {"sequence_parallel": True}
EXPERTS = [SP2, SP2 | {"expert_tensor_parallel": 1, "expert_parallel": 2}, {"data_parallel": 2, "expert_parallel": 2}]


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ({"family": "qwen2", "tie": True}, [TP2, PP2]),
        ({"family": "qwen3", "head_dim": 24}, [TP2, UNEVEN]),
        ({"family": "llama"}, [TP2]),
        ({"family": "qwen3_moe"}, EXPERTS),
    ],
    ids=["qwen2", "qwen3", "llama", "qwen3_moe"],
)
def test_the_parameters_are_those_of_mbridge(
    tmp_path: Path, model: dict[str, Any], layouts: list[dict[str, Any]]
) -> None:
    """With noise on every parameter, and a vocabulary that needs no padding."""
    write_model(tmp_path, byte_level_tokenizer(), hidden=64, ffn=96, jitter=0.05, pad_vocab_to=512, **model)
    for of_rank in run_ranks(2, unlike_mbridge, tmp_path, layouts, [free_port() for _ in layouts]):
        for layout, (count, unlike) in zip(layouts, of_rank, strict=True):
            assert count >= 10, layout
            assert unlike == [], layout
