"""Training state: saved under one layout and read under others it goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_coreward.actor.setup import Weights
from megatron_coreward.demo.model import write_model
from megatron_coreward.demo.tokenizer import byte_level_tokenizer
from megatron_coreward.types import TokenStats
from tests.actor.on_ranks import refuses_bad_gradient, resume, train_and_save
from tests.actor.ranks import free_port, run_ranks
from tests.actor.test_parity import make_batch

pytestmark = pytest.mark.ranks

WEIGHTS: tuple[Weights, ...] = ("policy", "teacher", "reference")


def logprobs(results: list[tuple[tuple[int, ...], TokenStats | None]]) -> dict[int, np.ndarray[Any, Any]]:
    return {row: stats.logprobs[i] for rows, stats in results if stats is not None for i, row in enumerate(rows)}


def assert_same(one: dict[int, Any], other: dict[int, Any], tolerance: float, what: str) -> None:
    assert one.keys() == other.keys()
    for row in one:
        np.testing.assert_allclose(one[row], other[row], atol=tolerance, err_msg=f"{what}, sequence {row}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """A model, the folder of a checkpoint written under TP 2, and what the run that wrote it saw."""
    path, folder = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("saved")
    write_model(path, byte_level_tokenizer(), hidden=64, ffn=96)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    for file in (file for file in path.rglob("*") if file.is_file()):
        file.chmod(0o444)  # as shared stores keep models
    (folder / "state").mkdir()
    layout = {"tensor_parallel": 2}
    return path, folder, run_ranks(2, train_and_save, path, layout, free_port(), make_batch(259), folder)


def test_policy_teacher_and_reference_are_three_models(run: tuple[Path, Path, list[Any]]) -> None:
    _, _, saved = run
    policy, teacher, reference = (logprobs([(rows, stats[w]) for rows, stats, _, _ in saved]) for w in WEIGHTS)
    assert np.abs(policy[0] - reference[0]).max() > 1e-2
    assert 1e-3 < np.abs(teacher[0] - reference[0]).max() < np.abs(policy[0] - reference[0]).max()


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"data_parallel": 2}, {"context_parallel": 2}]),
        pytest.param(4, [{"tensor_parallel": 2, "pipeline_parallel": 2}], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "4 ranks"],
)
def test_a_checkpoint_goes_on_under_any_layout(
    run: tuple[Path, Path, list[Any]], ranks: int, layouts: list[dict[str, Any]]
) -> None:
    path, folder, saved = run
    resumed = run_ranks(ranks, resume, path, layouts, [free_port() for _ in layouts], make_batch(259), folder)
    for place, layout in enumerate(layouts):
        here = [result[place] for result in resumed]
        same_layout = layout == {"tensor_parallel": 2}
        for weights in WEIGHTS:
            before = logprobs([(rows, stats[weights]) for rows, stats, _, _ in saved])
            now = logprobs([(rows, stats[weights]) for rows, stats, _, _ in here])
            assert_same(before, now, 0 if same_layout else 1e-5, f"{weights} under {layout}")
        after, expected = (logprobs([(rows, stats) for rows, _, _, stats in r]) for r in (here, saved))
        assert_same(expected, after, 0 if same_layout else 1e-4, f"teacher after one more update under {layout}")
        norms = [next(report["grad_norm"] for _, _, report, _ in r if report is not None) for r in (here, saved)]
        assert norms[0] == pytest.approx(norms[1], rel=0 if same_layout else 1e-4)


def test_an_export_has_all_files_of_a_read_only_source_and_the_modes_of_new_files(
    run: tuple[Path, Path, list[Any]], tmp_path: Path
) -> None:
    source, folder, _ = run
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    (tmp_path / "new").touch()
    for path in (folder / "hf", folder / "hf_teacher"):
        assert {file.relative_to(path) for file in path.rglob("*") if file.is_file()} == files
        for file in files:
            assert (path / file).stat().st_mode == (tmp_path / "new").stat().st_mode, file


@pytest.mark.slow
def test_experts_that_lie_whole_or_cut_go_on_under_any_layout(tmp_path: Path) -> None:
    """Saved with whole experts, spread over the tensor-parallel ranks, that have other replicas than the other
    layers."""
    write_model(tmp_path / "model", byte_level_tokenizer(), family="qwen3_moe", hidden=64, ffn=96)
    (tmp_path / "state").mkdir()
    whole = {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 1}
    batch, path = make_batch(259), tmp_path / "model"
    saved = run_ranks(2, train_and_save, path, {**whole, "expert_parallel": 2}, free_port(), batch, tmp_path)
    cut = {"tensor_parallel": 2, "sequence_parallel": True}
    layouts: list[dict[str, Any]] = [{**whole, "expert_parallel": 2}, whole, cut, {"data_parallel": 2}]
    layouts.append({"pipeline_parallel": 2, "first_stage_layers": 3, "last_stage_layers": 1})
    resumed = run_ranks(2, resume, path, layouts, [free_port() for _ in layouts], batch, tmp_path)
    for place, layout in enumerate(layouts):
        here = [result[place] for result in resumed]
        for weights in WEIGHTS:
            before, now = (logprobs([(rows, stats[weights]) for rows, stats, _, _ in r]) for r in (saved, here))
            assert_same(before, now, 1e-5 if place else 0, f"{weights} under {layout}")
        norms = [next(report["grad_norm"] for _, _, report, _ in r if report is not None) for r in (here, saved)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4 if place else 0)


@pytest.mark.parametrize(("folder_name", "weights"), [("hf", "policy"), ("hf_teacher", "teacher")])
def test_the_export_loads_in_transformers_and_gives_the_actors_log_probs(
    run: tuple[Path, Path, list[Any]], folder_name: str, weights: Weights
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, saved = run
    model = AutoModelForCausalLM.from_pretrained(folder / folder_name)
    assert len(AutoTokenizer.from_pretrained(folder / folder_name)) == 259
    expected = logprobs([(rows, stats[weights]) for rows, stats, _, _ in saved])
    sequences = make_batch(259).sequences
    for row, ids in enumerate(sequences.token_ids):
        prompt, tokens = int(sequences.prompt_lengths[row]), torch.from_numpy(ids).long()
        with torch.no_grad():
            logp = model(tokens[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(logp.gather(1, tokens[prompt:, None])[:, 0].numpy(), expected[row], atol=1e-5)


def test_an_infinite_gradient_stops_before_any_weight_moves(run: tuple[Path, Path, list[Any]]) -> None:
    path, _, _ = run
    assert run_ranks(1, refuses_bad_gradient, path, free_port(), make_batch(259)) == [(True, True)]
