"""State that gives its memory away comes back bit by bit, and training does not notice."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_coreward.actor.offload import Offloaded, Part
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor.offload_on_ranks import train
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch


def test_a_part_comes_back_as_it_left_and_holds_nothing_meanwhile() -> None:
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    view, before = tensor[2:].T, tensor.clone()
    offloaded = Offloaded({"part": Part(lambda: [tensor, tensor[1:]]), "other": Part(lambda: [torch.zeros(3)])})
    for _ in range(2):
        offloaded.leave("part")
        assert tensor.untyped_storage().nbytes() == 0
        offloaded.leave("part")  # again: nothing more to take
        offloaded.come("part")
        torch.testing.assert_close(tensor, before, rtol=0, atol=0)
        torch.testing.assert_close(view, before[2:].T, rtol=0, atol=0)


def test_what_changed_in_between_leaves_with_its_new_values() -> None:
    tensor = torch.zeros(4)
    offloaded = Offloaded({"part": Part(lambda: [tensor], rests_away=True)})
    offloaded.settle()
    with offloaded.at_hand("part"):
        tensor += 1
    assert tensor.untyped_storage().nbytes() == 0
    offloaded.come("part", "no such part")
    assert tensor.tolist() == [1.0] * 4


def test_a_part_that_is_here_stays_after_a_call_that_needs_it() -> None:
    tensor = torch.ones(4)
    offloaded = Offloaded({"part": Part(lambda: [tensor])})
    with offloaded.at_hand("part"):
        pass
    assert tensor.tolist() == [1.0] * 4


def test_a_failing_call_leaves_the_part_where_it_rests() -> None:
    tensor = torch.ones(4)
    offloaded = Offloaded({"part": Part(lambda: [tensor], rests_away=True)})
    offloaded.settle()
    with pytest.raises(ZeroDivisionError), offloaded.at_hand("part"):
        _ = 1 / 0
    assert tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.ranks
def test_training_does_not_notice_that_its_state_was_away(tmp_path: Path, dtype: str) -> None:
    write_model(tmp_path / "model", byte_level_tokenizer(), family="qwen3", hidden=64, ffn=96, head_dim=24)
    batch, runs = make_batch(259), []
    for number, away in enumerate((False, True)):
        layout = {"data_parallel": 2, "offload_optimizer": away, "offload_teacher": away}
        folder = tmp_path / f"state{number}"
        folder.mkdir()
        runs.append(run_ranks(2, train, tmp_path / "model", layout, free_port(), batch, dtype, away, folder))
    for plain, resting in zip(*runs, strict=True):
        for kind in ("state", "weights"):
            for one, other in zip(plain[kind], resting[kind], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert plain["report"] == resting["report"]
        np.testing.assert_array_equal(np.concatenate(plain["reference"]), np.concatenate(resting["reference"]))
        assert plain["state held"] > 0
        assert resting["state held"] == 0
        assert resting["gradients held"] == [0, 0]
        assert resting["copies kept"] == 0
        assert plain["described"] == {
            "backend": "local",
            "fp8": "off",
            "adam": "torch.AdamW",
            "gradient accumulation": "separate",
        }
