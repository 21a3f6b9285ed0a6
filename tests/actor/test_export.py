"""An export takes as long as it takes: a large model on a slow disk is more than one collective may wait for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.actor.export_on_ranks import TENSORS, slowly
from tests.actor.ranks import free_port, run_ranks


@pytest.mark.ranks
def test_an_export_may_take_longer_than_the_limit_of_other_collectives(tmp_path: Path) -> None:
    run_ranks(2, slowly, free_port(), 2.0, tmp_path)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
