"""Weights may travel any way: training over gloo is training through shared memory, and verify-sync proves either."""

from pathlib import Path

import pytest
import yaml

from megatron_coreward.cli import main
from tests.e2e.conftest import Task
from tests.e2e.test_train import digest, run

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.e2e, pytest.mark.timeout(400)]


def weights_after(task: Task, name: str, *changes: str) -> str:
    """The digest of the model that a short run leaves; its weights travel in many buckets, with checksums."""
    small = ["steps=2", "rollout.num_engines=2", "sync.bucket_mib=0.1", "validation.at_start=false"]
    return digest(run(task, f"run_dir={task.folder / name}", "sync.checksums=true", *small, *changes))


@pytest.fixture(scope="module")
def through_shared_memory(task: Task) -> str:
    return weights_after(task, "shared_memory", "sync.transport=shared_memory")


def test_a_run_over_gloo_is_the_run_through_shared_memory(task: Task, through_shared_memory: str) -> None:
    assert weights_after(task, "gloo", "sync.transport=gloo") == through_shared_memory


def test_a_colocated_run_is_the_disaggregated_one(task: Task, through_shared_memory: str) -> None:
    """Handing the GPU over changes who holds memory when, and no number."""
    handed_over = ["rollout.placement=colocated", "actor.offload_optimizer=true"]
    assert weights_after(task, "colocated", *handed_over) == through_shared_memory


@pytest.mark.slow
def test_context_parallel_ranks_send_every_block_once_over_either_way(task: Task) -> None:
    """The checks of a run (tiling, versions, checksums, log-probs of the canary) hold, and both ways give one model."""
    weights = {}
    for transport in ("shared_memory", "gloo"):
        layout = ["actor.tensor_parallel=1", "actor.context_parallel=2", f"sync.transport={transport}"]
        changes = [f"run_dir={task.folder / f'context_{transport}'}", "sync.checksums=true", "sync.bucket_mib=0.1"]
        weights[transport] = digest(run(task, *changes, *layout, "steps=2", "validation.at_start=false"))
    assert weights["gloo"] == weights["shared_memory"]


@pytest.mark.parametrize("transport", ["gloo", pytest.param("shared_memory", marks=pytest.mark.slow)])
def test_verify_sync_syncs_every_role_and_says_what_it_found(
    transport: str, task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(task.config("co_rewarding_ii", "sync.bucket_mib=0.1").model_dump(mode="json")))
    assert main(["verify-sync", str(config), f"sync.transport={transport}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["policy", "teacher", "policy", "teacher", "the"]
    assert "checksums equal" in lines[0]
