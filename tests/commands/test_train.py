"""`train --dry-run` shows a run and starts nothing, and every way into a run checks it once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_coreward import preflight as preflight_room
from megatron_coreward.cli import main
from megatron_coreward.commands.dry_run import describe_run, written_files
from megatron_coreward.config.load import load_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.errors import RunError
from megatron_coreward.preflight import machine, preflight
from tests.preflight.recipe_world import write_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(autouse=True)
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is large and has no GPU."""
    monkeypatch.chdir(world)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 1 << 40)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_shows_all_there_is_to_know_and_leaves_no_trace(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(world)
    layout = ["actor.tensor_parallel=2", "actor.data_parallel=2", "rollout.num_engines=3"]
    assert main(["train", "--dry-run", "recipe.yaml", *layout, "actor.lr=2e-5"]) == 0
    printed = capsys.readouterr().out
    assert "  method: co_rewarding_i\n" in printed
    assert "    lr: 2.0e-05\n" in printed
    assert "    kl_coef: 0.005\n" in printed  # resolved
    assert "4 questions in a step, in 2 views, 8 completions each\n" in printed
    assert "key-value caches (rollout.kv_cache_gib)       3.0 GiB\n" in printed
    assert "actor: 4 ranks (TP 2, CP 1, DP 2, PP 1, EP 1)\n" in printed
    assert "actor rank 3: stage 0, replica 1, context 0, tensor shard 1\n" in printed
    assert "rollout engines: 3 of 1 ranks each\n" in printed
    assert "written to run\n" in printed
    assert printed.endswith("nothing was started and nothing was written\n")
    assert files(world) == before


def test_a_dry_run_ends_as_the_run_would_where_it_cannot_work(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(world)
    assert main(["train", "recipe.yaml", "--dry-run", "actor.tensor_parallel=3"]) == 2
    printed = capsys.readouterr()
    assert "actor: 3 ranks" in printed.out
    assert "nothing wrong" not in printed.out
    assert printed.err.startswith("error: actor.tensor_parallel: 3 does not divide")
    assert files(world) == before


def test_a_dry_run_imports_neither_torch_nor_ray(world: Path) -> None:
    program = (
        "import sys\nfrom megatron_coreward.cli import main\n"
        "status = main(['train', 'recipe.yaml', '--dry-run'])\n"
        "print('imported:', sorted({'ray', 'torch', 'transformers', 'vllm'} & set(sys.modules)))\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=world,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout


def test_a_resumed_run_says_from_where(world: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"run/checkpoints/step_{step:06d}").mkdir(parents=True)
    (tmp_path / "run/checkpoints/damaged_step_000012").mkdir()
    config = load_config(world / "recipe.yaml", [f"run_dir={tmp_path / 'run'}", "steps=20"])
    assert "20 in all, resumed after step 10\n" in describe_run(config)


def test_ranks_of_a_cluster_are_reported_with_the_rules_by_which_they_are_placed(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    overrides = ["actor.tensor_parallel=2", "actor.data_parallel=16", "rollout.placement=colocated"]
    printed = describe_run(load_config(world / "recipe.yaml", [*overrides, "rollout.tensor_parallel=2"]))
    assert "on the nodes of the Ray cluster at 10.0.0.1:6379" in printed
    assert "actor rank 1: stage 0, replica 0, context 0, tensor shard 1, on the GPU of engine 0\n" in printed
    assert "actor rank 2: stage 0, replica 1, context 0, tensor shard 0\n" in printed
    assert "... and 16 further actor ranks\n" in printed


def test_the_plan_is_that_of_this_machines_gpus(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("megatron_coreward.commands.dry_run.visible_gpus", lambda: 2)
    printed = describe_run(load_config(world / "recipe.yaml"))
    assert "on 2 x h200 (140.4 GiB)" in printed
    assert "GiB a GPU of the actor" in printed
    assert "ranks: on this machine, with a GPU each\n" in printed


def test_everything_that_a_run_writes_is_named(world: Path) -> None:
    everywhere = ["telemetry.wandb_project=x", "telemetry.mlflow_experiment=x"]
    config = load_config(world / "recipe.yaml", ["guard.action=rollback", "guard.anchors=8", *everywhere])
    assert {name.rstrip("/") for name in written_files(config, None)} == set(machine.OWN_NAMES)


@pytest.mark.parametrize("entry", ["train", "attempt", "function"])
@pytest.mark.timeout(120)
def test_preflight_runs_once(entry: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_coreward import attempt
    from megatron_coreward.trainer import run

    checked: list[RunConfig] = []

    def counted(config: RunConfig) -> Any:
        checked.append(config)
        return preflight(config)

    def refuse(run_dir: Path) -> None:
        raise RunError("far enough")

    monkeypatch.setattr(preflight_room, "preflight", counted)
    monkeypatch.setattr(run, "preflight", counted)
    monkeypatch.setattr(run, "lock_run_directory", refuse)
    if entry == "train":
        assert main(["train", "recipe.yaml"]) == 1
    elif entry == "attempt":
        assert attempt.attempt(Path("recipe.yaml")) == 1
    else:
        with pytest.raises(RunError, match="far enough"):
            run.train(load_config(Path("recipe.yaml")))
    assert len(checked) == 1
