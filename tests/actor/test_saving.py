"""A checkpoint is written while training goes on: a snapshot, by a thread, and an error reaches every rank."""

from pathlib import Path

import pytest

from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from tests.actor import save_on_ranks
from tests.actor.memory_on_ranks import save_and_resume
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path, byte_level_tokenizer(), hidden=64, ffn=96)
    return path


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"data_parallel": 2}], ids=["TP 2", "DP 2"])
def test_the_values_saved_are_those_of_the_moment_and_no_process_is_started(
    model: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    for outcome in run_ranks(
        2, save_on_ranks.save_while_training, model, layout, free_port(), make_batch(259), tmp_path
    ):
        assert outcome == {"held": 0, "children": 0, "same as at the beginning": True, "hashes are right": True}


def test_a_disk_that_is_full_on_one_rank_is_an_error_on_all_and_the_next_save_works(
    model: Path, tmp_path: Path
) -> None:
    first, second = run_ranks(2, save_on_ranks.save_to_full_disk, model, free_port(), tmp_path)
    assert first == second
    assert "actor rank 1" in first
    assert "No space left on device" in first


def test_weights_in_fp8_are_saved_as_numbers_one_at_a_time(model: Path, tmp_path: Path) -> None:
    """Tensors of the model's dtype stand for FP8 ones: what is made of them is counted while it lives."""
    for outcome in run_ranks(2, save_on_ranks.save_fp8_weights, model, free_port(), tmp_path):
        assert outcome == {"alive at once": 1, "restored": True}


def test_a_skipped_update_moves_nothing_and_training_goes_on(model: Path) -> None:
    assert run_ranks(1, save_on_ranks.skip_bad_gradient, model, free_port(), make_batch(259)) == [
        {"weights as before": True, "moments as before": True, "reported": 1.0, "next update is finite": True}
    ]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_share_the_writing_and_resume_within_a_third_more_than_they_own(tmp_path: Path, ranks: int) -> None:
    """A model large enough that what the libraries take does not matter: 20 million parameters."""
    write_model(tmp_path / "model", byte_level_tokenizer(), hidden=384, ffn=1024, pad_vocab_to=16_384)
    layout = {"data_parallel": ranks}
    outcomes = run_ranks(ranks, save_and_resume, tmp_path / "model", layout, free_port(), tmp_path)
    whole = sum(outcome["written_bytes"] for outcome in outcomes)
    for outcome in outcomes:
        assert outcome["restored"]
        assert 0.6 / ranks < outcome["written_bytes"] / whole < 1.5 / ranks
        assert outcome["resume_extra_bytes"] < 0.3 * outcome["owned_bytes"]
