"""Packed and padded runs compute the same: log-probs, statistics, loss and gradients.

`test_parity.py` compares packs with plain transformers; this one compares packs with rows of a padded batch, in one
model, so that only the packing differs.
"""

from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor.offload_on_ranks import by_packing
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(("tokens", "packs"), [(4096, 1), (128, 3)])
def test_packing_changes_nothing_but_the_shape_of_the_work(tmp_path: Path, tokens: int, packs: int) -> None:
    write_model(tmp_path, byte_level_tokenizer(), family="qwen3", hidden=64, ffn=96, head_dim=24)
    batch = make_batch(259)
    ((packed, padded),) = run_ranks(1, by_packing, tmp_path, free_port(), batch, tokens)
    assert (packed["packs"], padded["packs"]) == (packs, len(batch))
    for of_packed, of_padded in zip(packed["stats"], padded["stats"], strict=True):
        np.testing.assert_allclose(of_packed, of_padded, rtol=1e-5, atol=1e-6)
    for key, value in padded["loss"].items():
        assert packed["loss"][key] == pytest.approx(value, rel=1e-5), key
    assert packed["gradients"].keys() == padded["gradients"].keys()
    for name, pieces in padded["gradients"].items():
        for (_, of_packed), (_, of_padded) in zip(packed["gradients"][name], pieces, strict=True):
            error = np.linalg.norm(of_packed - of_padded) / np.linalg.norm(of_padded)
            assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"
