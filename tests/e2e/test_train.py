"""`megatron-coreward train` on the real stack: what it leaves behind, and that it goes on where it stopped."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_coreward.checkpoint.store import checkpoint_path, saved_steps
from megatron_coreward.cli import main
from megatron_coreward.config.load import dump_config, load_config
from megatron_coreward.preflight.machine import OWN_NAMES
from megatron_coreward.telemetry.jsonl import Row, read_rows
from megatron_coreward.telemetry.rollout_dump import read_rollouts, rollouts_path
from tests.e2e.conftest import Task

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(600)]


def run(task: Task, *overrides: str) -> Path:
    recipe = task.folder / "recipe.yaml"
    config = task.config("co_rewarding_ii", *overrides)
    recipe.write_text(dump_config(config))
    assert main(["train", str(recipe)]) == 0
    return config.run_dir


@pytest.fixture(scope="module")
def finished(task: Task) -> Path:
    return run(task, "checkpoint.every=2")


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "hf" / "model.safetensors").read_bytes()).hexdigest()


def test_the_run_directory_is_complete(finished: Path) -> None:
    assert load_config(finished / "config.yaml").steps == 3
    assert saved_steps(finished) == [2, 3]
    assert list((finished / "tensorboard").iterdir())
    assert (finished / "report.html").read_text().startswith("<!doctype html>")
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for key in ("val/pass@1", "val/avg@8", "val/maj@8"):
        assert 0 <= float(rows[0][key]) <= 1
        assert 0 <= float(rows[3][key]) <= 1
    assert {path.name for path in finished.iterdir()} <= set(OWN_NAMES)
    logs = {path.name: path.read_text() for path in (finished / "logs").iterdir()}
    assert {"engine_0.log", "actor_rank_0.log"} <= logs.keys()
    assert all(text.startswith("--- process ") for text in logs.values())
    assert "Timeout (" not in "".join(logs.values())  # no call hung
    assert not list(finished.rglob("*partial*"))


def test_every_step_is_synchronised_with_the_engines(finished: Path) -> None:
    for row in read_rows(finished / "metrics.jsonl")[1:]:
        assert float(row["sync/logprob_gap_max"]) < 1e-3
        assert float(row["sync/canary_gap"]) < 1e-3


def test_rollouts_carry_the_version_of_their_weights(finished: Path) -> None:
    for step in (1, 2, 3):
        groups = read_rollouts(rollouts_path(finished, step))
        versions = {(g.group.role, c.weight_version) for g in groups for c in g.group.completions}
        assert versions == {("policy", 2 * (step - 1)), ("teacher", 2 * (step - 1) + 1)}


def test_the_final_model_loads_in_transformers_and_explains_its_own_rollouts(finished: Path, task: Task) -> None:
    """The model that a run starts from gives the log-probs that the engines returned in its first step."""
    import torch
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(finished / "hf").config.model_type == "qwen3"
    model = AutoModelForCausalLM.from_pretrained(task.folder / "start")
    groups = [g.group for g in read_rollouts(rollouts_path(finished, 1)) if g.group.role == "policy"]
    for group in groups[:2]:
        for completion in group.completions:
            prompt = group.prompt.token_ids
            ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids])).long()
            with torch.no_grad():
                logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logp.gather(1, ids[len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def comparable(row: Row) -> dict[str, object]:
    return {k: v for k, v in row.items() if "time" not in k and not k.endswith(("_s", "/seconds"))}


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(finished: Path, task: Task) -> None:
    expected_weights, expected_rows = digest(finished), read_rows(finished / "metrics.jsonl")
    shutil.rmtree(checkpoint_path(finished, 3))
    shutil.rmtree(finished / "hf")
    assert run(task, "checkpoint.every=2") == finished
    assert digest(finished) == expected_weights
    rows = read_rows(finished / "metrics.jsonl")
    assert [comparable(row) for row in rows] == [comparable(row) for row in expected_rows]


def test_a_finished_run_is_not_overwritten(finished: Path, task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = task.folder / "recipe.yaml"
    recipe.write_text(dump_config(task.config("co_rewarding_ii")))
    assert main(["train", str(recipe)]) == 2
    assert "has done its 3 steps" in capsys.readouterr().err
